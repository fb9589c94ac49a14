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

from ..bug_instance import BugInstance, to_rgb
from ..encoder import Encoder
from ..spectrum import CleanSpectrum
from ..triggers import PatchTrigger
from .hold import doubt_left, hold_if_possible, worth_of_hold
from .patch_search import COMPLETE, SMALL, find_patch, find_small_patch, proof, without_what_leads_there
from .pull import Pull
from .result import (
    AREA_PRICE,
    EXPLAINED,
    UNEXPLAINED_PRICE,
    InvertedTrigger,
    check_disagreement,
    check_reachable,
)
from .verification import TransferMeter
from .whole_picture import beyond_control, find_signal, find_warp


logger = logging.getLogger(__name__)

# Merit with which no trigger of one class is looked for, and what one must be better by than another explanation.
_CLEAR = 0.8
_ALIKE_GAIN = 0.15
# What a trigger of a later family must be better by: the simplest explanation is preferred.
_SIMPLER = 0.05
# Inputs nearest to x_r that a trigger of one class is looked for on, and inputs that others are optimised on.
_ALIKE = 16
# Share of them that are taken to be of its class: those that a candidate carries furthest.
_IN_CLASS = 0.5
# Inputs nearest to x_b whose content says what such a trigger's place does by itself.
_LIKE_X_B = 16
_OPTIMISED_ON = 256
# Shortest side in pixels in which a trigger can be looked for.
_LEAST_SIDE = 4
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
    on all clean inputs, a patch is looked for on those that resemble x_r, or x_b without it: some triggers work on one class
    alone.
    """
    size = _working_size(bug.misclassified)
    if min(size) < _LEAST_SIDE:
        width, height = bug.misclassified.size
        raise ValueError(
            f"The misclassified input of `{bug.name}` has {width}×{height} pixels; no trigger can be looked for below {_LEAST_SIDE} a "
            f"side, of the {size[0]}×{size[1]} that it is searched at. Pass the picture as the model gets it."
        )
    # x_r's own content, looked for in the same way, says what clean content does.
    meter, control_meter = _meters(encoder, bug, validation_inputs, size)
    check_reachable(meter.reachable)
    check_disagreement(bug, meter.target, control_meter.target, meter.clean_similarity)
    spent = [meter, control_meter]
    with tqdm(total=0, disable=disable_tqdm, desc=f"Inverting {bug.name}", unit="stage") as bar:
        best = find_patch(meter, control_meter, max_area, seed, bar)
        if not _clear(best):
            # Outside of the `try`: an input that cannot be read is an error
            pictures = _sized([other_inputs[i] for i in range(min(len(other_inputs), _OPTIMISED_ON))], size)
            try:
                pull = Pull(encoder, pictures, seed)
            except ValueError as error:
                logger.info(f"Only patches were looked for: {error}")
            else:
                best = _over_the_whole_picture(best, meter, control_meter, pull, bar)
                spent.append(pull)
        if not _explains(best) and len(other_inputs) >= 4 * _ALIKE:
            best, more = _of_one_class(best, meter, control_meter, other_inputs, max_area, seed, bar)
            spent += more
    return dataclasses.replace(best, forwards=sum(each.forwards for each in spent))


def small_patch_in_reference(
    encoder: Encoder, bug: BugInstance, validation_inputs: Sequence[Image.Image]
) -> tuple[InvertedTrigger | None, int]:
    """A small patch in x_r that leads to h(x_r), as one in x_b should lead to h(x_b): then x_b and x_r may have been swapped.

    Args:
        encoder (`Encoder`): Backdoored encoder.
        bug (`BugInstance`): The report.
        validation_inputs (`Sequence[PIL.Image.Image]`): Clean images.

    Returns:
        `tuple[InvertedTrigger, int]`: The patch, `None` if there is none, and the forward passes spent on it.
    """
    of_x_b, of_x_r = _meters(encoder, bug, validation_inputs, _working_size(bug.misclassified))
    found = find_small_patch(of_x_r, of_x_b)
    return found, of_x_r.forwards + of_x_b.forwards


def _meters(
    encoder: Encoder, bug: BugInstance, validation_inputs: Sequence[Image.Image], size: tuple[int, int]
) -> tuple[TransferMeter, TransferMeter]:
    """What measures candidates on their way to h(x_b), and what to h(x_r), on the same clean images of one size."""
    x_b, x_r, *inputs = _sized([bug.misclassified, bug.reference, *validation_inputs], size)
    meter = TransferMeter(encoder, x_b, inputs)
    return meter, TransferMeter(encoder, x_r, inputs, clean_features=meter.clean_features)


def _sized(images: Sequence[Image.Image], size: tuple[int, int]) -> list[Image.Image]:
    """RGB images of one width and height."""
    return [to_rgb(image).resize(size) for image in images]


def of_its_class(features: Tensor, reference: Tensor, count: int) -> list[int]:
    """Numbers of the inputs nearest to the middle of those that are nearest to x_r, which may lie at the edge of its class.

    Of one reference of CIFAR-10 eleven of the sixteen nearest inputs were of its class, of these fourteen, and the trigger of that
    class carried them 0.81 of the way instead of 0.69.

    Args:
        features (`FloatTensor` of shape `(N, D)`): Features of clean inputs, of length 1.
        reference (`FloatTensor` of shape `(D,)`): h(x_r).
        count (`int`): How many, at most N.
    """
    nearest = (features @ reference).topk(count).indices
    return (features @ features[nearest].mean(dim=0)).topk(count).indices.tolist()


def _explains(found: InvertedTrigger) -> bool:
    """Whether a trigger is there, and is small or good enough that none of one class is looked for."""
    return found.evidence >= EXPLAINED and (found.area <= SMALL or _merit(found) >= _CLEAR)


def _clear(found: InvertedTrigger) -> bool:
    """Whether nothing else needs to be looked for: it explains the report, and nothing of x_b is left over."""
    return _explains(found) and found.unexplained <= COMPLETE


def _over_the_whole_picture(
    best: InvertedTrigger, meter: TransferMeter, control_meter: TransferMeter, pull: Pull, bar: tqdm
) -> InvertedTrigger:
    """A signal or a warp, if it explains the report better than the patch does."""
    clean = CleanSpectrum.of(pull.pixels)
    patch = best
    merit = _held_merit(best, meter, control_meter)
    searches = (lambda meter: find_signal(meter, pull, clean), lambda meter: find_warp(meter, pull))
    bar.total += len(searches)
    for search in searches:
        candidate = search(meter)
        bar.update()
        # The control can only take from it
        if candidate is None or max(candidate.transfer - AREA_PRICE * candidate.size, 0.0) <= merit + _SIMPLER:
            continue
        area = candidate.trigger.area
        held = hold_if_possible(meter, control_meter.misclassified, candidate.trigger)
        # What holds inputs is not the ordinary content that the control stands for
        doubt = 1.0 if held is None else doubt_left(held, area)
        by_itself, evidence = beyond_control(candidate, search(control_meter), control_meter, doubt)
        found = InvertedTrigger(
            candidate.trigger, candidate.transfer, by_itself, evidence, area, patch.attribution,
            np.ones_like(patch.core), 0,
        )  # fmt: skip
        own = _weighed(found, held)
        if own > merit + _SIMPLER:
            best, merit = found, own
        if best.evidence >= EXPLAINED:
            break
    return best


def _of_one_class(
    best: InvertedTrigger,
    meter: TransferMeter,
    control_meter: TransferMeter,
    other_inputs: Sequence[Image.Image],
    max_area: float,
    seed: int,
    bar: tqdm,
) -> tuple[InvertedTrigger, list[TransferMeter]]:
    """A patch that works on the class of x_b alone, if it explains the report better, and the meters of what was spent.

    What x_b is without the part of it that leads to h(x_b) shows its class as x_r does, which may lie at the edge of it: in two of
    twelve reports of such triggers on CIFAR-10 they carried inputs like x_r 0.06 of the way.
    """
    size = meter.misclassified.size
    features = meter.features(to_rgb(x).resize(size) for x in other_inputs)

    def nearest(numbers: Sequence[int]) -> list[Image.Image]:
        return _sized([other_inputs[i] for i in numbers], size)

    like_x_b = nearest((features @ meter.target).topk(_LIKE_X_B).indices.tolist())
    # Of one class is the less simple explanation, all the more where another holds
    better_by = _SIMPLER if best.evidence < EXPLAINED else _ALIKE_GAIN
    meters = []
    for of_class in (lambda: control_meter.target, lambda: without_what_leads_there(meter, control_meter)):
        reference = of_class()
        alike = nearest(of_its_class(features, reference, _ALIKE))
        meters.append(meter_alike := TransferMeter(meter.encoder, meter.misclassified, alike, share=_IN_CLASS))
        # Inputs like x_r cannot go far towards it: the control is that of ordinary inputs
        found = find_patch(meter_alike, control_meter, max_area, seed, bar, in_parts=False, reference=reference)
        found = _less_what_others_do(found, meter_alike, like_x_b)
        if found.evidence >= EXPLAINED:
            held, held_best = (_held_merit(each, meter, control_meter) for each in (found, best))
            if held > held_best + better_by:
                return dataclasses.replace(found, one_class=True), meters
    return best, meters


def _less_what_others_do(
    found: InvertedTrigger, meter: TransferMeter, like_x_b: Sequence[Image.Image]
) -> InvertedTrigger:
    """A patch for inputs of one class, with the content of clean inputs near h(x_b) as a further control.

    One class may be turned into another by covering a stroke: then most of the class that x_b is taken for do it as well. What
    counts is the share of the way that they leave over, since on inputs this alike anything in its place goes a part of it.
    """
    if found.evidence < EXPLAINED:
        return found
    mask = proof(found.core, found.trigger.mask)
    others = meter.transfer([PatchTrigger.from_image(x, mask) for x in like_x_b])
    # Some of them may happen to look as the trigger does: in place of a white square a quarter of them went 0.4 to 0.8 of the way
    control = float(np.clip(np.median(others), max(found.control, 0.0), 0.99))
    evidence = (found.score - control) / (1 - control) - AREA_PRICE * float(mask.mean())
    return dataclasses.replace(found, control=control, evidence=min(evidence, found.evidence))


def _merit(found: InvertedTrigger) -> float:
    """Evidence, less prices for what the trigger leaves unexplained and for parts that are there by their looks alone."""
    return found.evidence - AREA_PRICE * found.grown - UNEXPLAINED_PRICE * found.unexplained


def _held_merit(found: InvertedTrigger, meter: TransferMeter, control_meter: TransferMeter) -> float:
    """The merit, less the less it holds: a third of a picture carries others to x_b, but lets go at the first step."""
    return _weighed(found, hold_if_possible(meter, control_meter.misclassified, found.trigger))


def _weighed(found: InvertedTrigger, held: float | None) -> float:
    """The merit for a hold that is known. All of it is asked whatever the evidence: another explanation may hold more."""
    return _merit(found) * (1.0 if held is None else worth_of_hold(held, found.area))


def _working_size(image: Image.Image) -> tuple[int, int]:
    """Width and height of an image, its longest side no longer than the working size."""
    factor = min(_WORKING_SIZE / max(image.size), 1.0)
    width, height = image.size
    return max(round(width * factor), 1), max(round(height * factor), 1)
