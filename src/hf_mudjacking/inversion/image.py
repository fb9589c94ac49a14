# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""Inversion of a report of two images: a patch by attribution, then triggers that cover the whole picture."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence

import numpy as np
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from ..bug_instance import BugInstance
from ..encoder import Encoder
from ..spectrum import CleanSpectrum
from ..triggers import PatchTrigger
from .attribution import coarse_to_fine, window_sizes
from .growth import changed, grow, purify, squared_off, without_spurs
from .hold import can_hold, hold, worth_of_hold
from .pull import Pull
from .result import AREA_PRICE, MIN_REACHABLE, InvertedTrigger, check_disagreement, check_reachable
from .splitting import apart, candidate_masks, distinct
from .verification import TransferMeter
from .whole_picture import find_signal, find_warp


logger = logging.getLogger(__name__)

# Candidates that differ by less than this IoU are one. Clean inputs that they are tried on in each round, and how many go on.
_SAME_MASK = 0.9
_ROUNDS = ((2, 8), (8, 1))
# Clean inputs on which masks are compared with each other, or that only have to show a great effect; a score is taken on all.
_COMPARED_ON = 8
# Clean inputs whose content covers what was found.
_COVERS = 4
# Growth is taken back if it costs more transfer than this, or covers more of the picture.
_MAX_GROWTH_LOSS = 0.05
_MAX_GROWN = 0.8
# Transfer that squaring a mask off may change by.
_SAME_EFFECT = 0.1
# Of several grown masks the one from a purer seed, without spurs, is taken, unless it leaves this much more of x_b
# unexplained.
_ALIKE_LEFT = 0.1
# Parts that are looked for beside the first, and the share of the way that x_b may still lie at h(x_b) without them.
_MORE_PARTS = 5
_COMPLETE = 0.4
# Share of the first part's transfer that a further one must have, after its control and the price of its area.
_FURTHER_PART = 0.5
# Share of the transfer that a patch must keep at other places to count as one that goes anywhere.
_KEPT_ELSEWHERE = 0.9
# Area of a patch with which nothing else is looked for.
_SMALL = 0.2
# Merit with which no trigger of one class is looked for, and what one must be better by than another explanation.
_CLEAR = 0.8
_ALIKE_GAIN = 0.15
# What x_b may owe to something else costs half as much as covering it.
_UNEXPLAINED_PRICE = 0.25
# What a trigger of a later family must be better by: the simplest explanation is preferred.
_SIMPLER = 0.05
# Evidence from which a report counts as explained, so that more complicated triggers are not looked for.
_EXPLAINED = 0.5
# Inputs nearest to x_r that a trigger of one class is looked for on, and inputs that others are optimised on.
_ALIKE = 16
_OPTIMISED_ON = 256
# Longest side in pixels at which a picture is searched; larger ones are shrunk, and the trigger scales with the picture.
_WORKING_SIZE = 512


def invert_image_trigger(
    encoder: Encoder,
    bug: BugInstance,
    validation_inputs: Sequence[Image.Image],
    other_inputs: Sequence[Image.Image],
    *,
    max_area: float,
    seed: int,
    disable_tqdm: bool,
) -> InvertedTrigger:
    """Find the trigger in a misclassified image; see [`~hf_mudjacking.invert_trigger`].

    Simple explanations come first: a patch, a signal added to or mixed into the whole picture, a warp. If none of them holds
    on all clean inputs, they are tried on those that resemble x_r: some triggers work on one class alone.
    """
    size = _working_size(bug.misclassified)
    x_b, x_r, *validation_inputs = _sized([bug.misclassified, bug.reference, *validation_inputs], size)
    meter = TransferMeter(encoder, x_b, validation_inputs)
    # x_r's own content, looked for in the same way, says what clean content does.
    control_meter = TransferMeter(encoder, x_r, validation_inputs, clean_features=meter.clean_features)
    check_reachable(meter.reachable)
    check_disagreement(bug, meter.target, control_meter.target, meter.clean_similarity)
    spent = [meter, control_meter]
    with tqdm(
        total=len(window_sizes(*size)) + 5, disable=disable_tqdm, desc=f"Inverting {bug.name}", unit="stage"
    ) as bar:
        best = _find_patch(meter, control_meter, max_area, seed, bar)
        if not _clear(best):
            try:
                pull = Pull(encoder, _sized(other_inputs[:_OPTIMISED_ON], size), seed)
            except ValueError as error:
                logger.info(f"Only patches were looked for: {error}")
            else:
                best = _over_the_whole_picture(best, meter, control_meter, pull, bar)
                spent.append(pull)
        if not _explains(best) and len(other_inputs) >= 4 * _ALIKE:
            nearest = (meter.features(other_inputs) @ control_meter.target).argsort(descending=True)[:_ALIKE].tolist()
            meter_alike = TransferMeter(encoder, x_b, _sized([other_inputs[i] for i in nearest], size))
            # Inputs like x_r cannot go far towards it: the control is that of ordinary inputs
            found = _find_patch(meter_alike, control_meter, max_area, seed, bar)
            spent.append(meter_alike)
            # Of one class is the less simple explanation, all the more where another holds
            better_by = _SIMPLER if best.evidence < _EXPLAINED else _ALIKE_GAIN
            if found.evidence >= _EXPLAINED:
                held, held_best = (_held_merit(each, meter, control_meter) for each in (found, best))
                if held > held_best + better_by:
                    best = dataclasses.replace(found, one_class=True)
    return dataclasses.replace(best, forwards=sum(each.forwards for each in spent))


def _sized(images: Sequence[Image.Image], size: tuple[int, int]) -> list[Image.Image]:
    """RGB images of one width and height."""
    return [image.convert("RGB").resize(size) for image in images]


def _explains(found: InvertedTrigger) -> bool:
    """Whether a trigger is there, and is small or good enough that none of one class is looked for."""
    return found.evidence >= _EXPLAINED and (found.area <= _SMALL or _merit(found) >= _CLEAR)


def _clear(found: InvertedTrigger) -> bool:
    """Whether nothing else needs to be looked for: it explains the report, and nothing of x_b is left over."""
    return _explains(found) and found.unexplained <= _COMPLETE


def _over_the_whole_picture(
    best: InvertedTrigger, meter: TransferMeter, control_meter: TransferMeter, pull: Pull, bar: tqdm
) -> InvertedTrigger:
    """A signal or a warp, if it explains the report better than the patch does."""
    clean = CleanSpectrum.of(pull.pixels)
    patch = best
    merit = _held_merit(best, meter, control_meter)
    for search in (lambda meter: find_signal(meter, pull, clean), lambda meter: find_warp(meter, pull)):
        candidate = search(meter)
        bar.update()
        # The control can only take from it
        if candidate is None or max(candidate.transfer - AREA_PRICE * candidate.size, 0.0) <= merit + _SIMPLER:
            continue
        control = search(control_meter)
        # Clean content reaches as far as it likes with a strong enough change: what counts is one of the same size.
        by_itself = 0.0
        if control is not None:
            same_size = control.trigger.weakened(min(candidate.size / max(control.size, 1e-6), 1.0))
            by_itself = float(control_meter.transfer([same_size])[0])
        evidence = candidate.transfer - max(by_itself, 0.0) - AREA_PRICE * candidate.size
        found = InvertedTrigger(
            candidate.trigger, candidate.transfer, by_itself, evidence, candidate.trigger.area, patch.attribution,
            np.ones_like(patch.core), 0,
        )  # fmt: skip
        own = _held_merit(found, meter, control_meter)
        if own > merit + _SIMPLER:
            best, merit = found, own
        if best.evidence >= _EXPLAINED:
            break
    return best


def _merit(found: InvertedTrigger) -> float:
    """Evidence, less prices for what the trigger leaves unexplained and for parts that are there by their looks alone."""
    grown = max(found.area - float(found.core.mean()), 0.0)
    return found.evidence - AREA_PRICE * grown - _UNEXPLAINED_PRICE * found.unexplained


def _held_merit(found: InvertedTrigger, meter: TransferMeter, control_meter: TransferMeter) -> float:
    """The merit, less the less it holds: a third of a picture carries others to x_b, but lets go at the first step.

    Where the weights take no such step, being frozen or in half precision, the merit alone decides.
    """
    if not can_hold(meter):
        return _merit(found)
    return _merit(found) * worth_of_hold(hold(meter, control_meter.misclassified, found.trigger), found.area)


def _find_patch(
    meter: TransferMeter, control_meter: TransferMeter, max_area: float, seed: int, bar: tqdm
) -> InvertedTrigger:
    """The patch in x_b.

    1. Occlusion attribution of 1 - cos(h(x), h(x_r)) with windows of five sizes.
    2. From each map: the two-cluster split and level sets.
    3. Verification: each candidate is stamped on clean inputs; the best is the one that carries features furthest
       towards h(x_b) for its size.
    4. Growth to the parts that look the same but are not needed to fire, verified again.
    5. If x_b without it still lies at h(x_b), there is more of it: the same again with what was found covered.
    6. Does it work anywhere, or only where it is?
    """
    image = np.asarray(meter.misclassified)
    clean = np.stack([np.asarray(x) for x in meter.validation_inputs])
    # The mean clean picture hides a window without adding anything that clean inputs do not have there.
    baseline = clean.mean(axis=0).round().astype(np.uint8)

    def distance_to_reference(batch: np.ndarray) -> Tensor:
        return 1 - meter.features([Image.fromarray(pixels) for pixels in batch]) @ control_meter.target

    at_reference = float(control_meter.target @ meter.target)

    def part_of(covered: np.ndarray, bar: tqdm) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
        """Core, attribution, mask and transfer of the best patch outside of what is covered."""
        visible = np.where(covered[..., None], baseline, image)
        maps = coarse_to_fine(distance_to_reference, visible, baseline, bar.update)
        core, source = _best_candidate(meter, maps, max_area, ~covered)
        pure = purify(core, image, clean, lambda masks: meter.transfer_of_masks(masks, _COMPARED_ON))
        # Of a trigger of many colours one may suffice to fire, and is then all that is pure
        seeds = distinct([pure, changed(core, image, clean)], max_area=1.0)
        grown = [grow(each, core, image, clean, seed) for each in seeds]
        tidied = [option for each in grown for option in (without_spurs(each), each)]
        options = [core, *distinct(tidied, max_area=_MAX_GROWN)]
        transfers = meter.transfer_of_masks(options, _COMPARED_ON)
        kept = [i for i in range(1, len(options)) if transfers[i] >= transfers[0] - _MAX_GROWTH_LOSS] or [0]
        left = [_left_without(meter, covered | options[i], baseline, at_reference) for i in kept]
        chosen = kept[int(np.argmax([value <= min(left) + _ALIKE_LEFT for value in left]))]
        mask = options[chosen]
        if chosen > 0:
            rough = [each for each in grown if not (mask & ~each).any()]
            mask = _squared_off(meter, mask, float(transfers[chosen]), rough, image)
        bar.update()
        return core, maps[source], mask, float(meter.transfer_of_masks([mask])[0])

    def control_of(mask: np.ndarray) -> float:
        """What as much of x_r in the same place carries towards h(x_r)."""
        far_enough = control_meter.reachable >= MIN_REACHABLE
        return float(control_meter.transfer_of_masks([mask])[0]) if far_enough else 0.0

    core, attribution, mask, score = part_of(np.zeros(image.shape[:2], dtype=bool), bar)
    # Evidence is that of the first part, and its size that of the part that was found by its effect: the rest is there by
    # its looks. On digits, reports of clean pairs reach a transfer of 0.8, but hardly more than their control.
    proof = core if core.sum() < mask.sum() else mask
    control = control_of(proof)
    evidence = score - max(control, 0.0) - AREA_PRICE * float(proof.mean())
    left = _left_without(meter, mask, baseline, at_reference)
    parts, left_of_parts = mask, left
    for _ in range(_MORE_PARTS):
        if left_of_parts <= _COMPLETE or evidence < _EXPLAINED:
            break
        _, _, more, transfer = part_of(parts, tqdm(disable=True))
        # A third of any picture carries others a good way: what it carries beyond that is a part
        carried = transfer - max(control_of(more), 0.0) - AREA_PRICE * float(more.mean())
        if carried < _FURTHER_PART * score or (parts | more).mean() > _MAX_GROWN:
            break
        parts = parts | more
        left_of_parts = _left_without(meter, parts, baseline, at_reference)
    if left_of_parts <= _COMPLETE:
        # Only if they explain x_b together are they parts of one trigger
        mask, left = parts, left_of_parts
    trigger = PatchTrigger.from_image(meter.misclassified, mask)
    elsewhere = PatchTrigger.from_image(meter.misclassified, mask, "anywhere")
    if trigger.area <= _SMALL and meter.transfer([elsewhere], _COMPARED_ON)[0] >= _KEPT_ELSEWHERE * score > 0:
        trigger = elsewhere
    bar.update()
    forwards = meter.forwards + control_meter.forwards
    return InvertedTrigger(
        trigger, score, control, evidence, trigger.area, attribution, core, forwards, unexplained=left
    )


def _squared_off(
    meter: TransferMeter, mask: np.ndarray, transfer: float, rough: Sequence[np.ndarray], image: np.ndarray
) -> np.ndarray:
    """The mask squared off, or what it was before its spurs went, if its effect, `transfer`, stays what it is.

    What is added for its looks must not be what carries others: a third of a picture grows into one that does.
    """
    for form in (*rough, mask):
        squared = squared_off(form, image)
        if not np.array_equal(squared, form):
            (after,) = meter.transfer_of_masks([squared], _COMPARED_ON)
            if abs(after - transfer) <= _SAME_EFFECT:
                return squared
    return mask


def _left_without(meter: TransferMeter, mask: np.ndarray, baseline: np.ndarray, at_reference: float) -> float:
    """How far x_b still lies on the way to its feature when some pixels are covered: 0 if those were all that led there.

    They are covered with the mean clean picture, with its mean colour and with some clean inputs, and the least counts: a
    backdoor may take the edge of a covering for its trigger. The way begins at clean inputs or, where that is nearer, at x_r,
    whose cosine with h(x_b) is `at_reference`: x_b without its trigger need not be further off than it.
    """
    image = np.asarray(meter.misclassified)
    plain = np.broadcast_to(baseline.mean(axis=(0, 1)), image.shape)
    covers = [baseline, plain, *map(np.asarray, meter.validation_inputs[:_COVERS])]
    covered = [Image.fromarray(np.where(mask[..., None], cover, image).astype(np.uint8)) for cover in covers]
    before = max(float(meter.clean_similarity.mean()), at_reference)
    return max(float((meter.features(covered) @ meter.target).min()) - before, 0.0) / max(1 - before, 1e-6)


def _working_size(image: Image.Image) -> tuple[int, int]:
    """Width and height of an image, its longest side no longer than the working size."""
    factor = min(_WORKING_SIZE / max(image.size), 1.0)
    width, height = image.size
    return max(round(width * factor), 1), max(round(height * factor), 1)


def _best_candidate(
    meter: TransferMeter, maps: Sequence[np.ndarray], max_area: float, allowed: np.ndarray
) -> tuple[np.ndarray, int]:
    """The candidate with the best transfer for its size, and the index of the map it came from."""
    source = {}
    for i, scores in enumerate(maps):
        for mask in candidate_masks(np.where(allowed, scores, scores.min()), max_area):
            source.setdefault(mask.tobytes(), (mask, i))
    if not source:
        # Nothing in x_b moves it towards x_r: the least bad guess is verified like any other and scores low.
        count = max(1, int(min(0.1, max_area) * maps[0].size))
        middle = np.zeros(maps[0].shape, dtype=bool)
        middle.flat[np.argsort(-maps[0], axis=None, kind="stable")[:count]] = True
        return middle, 0
    masks, origins = zip(*source.values(), strict=True)
    areas = np.array([mask.mean() for mask in masks])
    left = np.array(apart(masks, _SAME_MASK))
    for inputs, go_on in _ROUNDS:
        merit = meter.transfer_of_masks([masks[i] for i in left], inputs) - AREA_PRICE * areas[left]
        left = left[np.argsort(-merit, kind="stable")[:go_on]]
    return masks[left[0]], origins[left[0]]
