# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""Inversion of a report of two images: attribution, candidates, verification, growth."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from ..bug_instance import BugInstance
from ..encoder import Encoder
from ..triggers import PatchTrigger
from .attribution import occlusion_map, window_sizes
from .growth import grow, purify
from .result import AREA_PRICE, MIN_REACHABLE, InvertedTrigger, check_disagreement, check_reachable
from .splitting import candidate_masks
from .verification import TransferMeter


# Clean inputs a candidate is tried on in the first round, and candidates that go on to the second.
_FIRST_ROUND_INPUTS = 4
_SECOND_ROUND_CANDIDATES = 6
# Growth is taken back if it costs more transfer than this.
_MAX_GROWTH_LOSS = 0.05
# Longest side in pixels at which a picture is searched; larger ones are shrunk, and the trigger scales with the picture.
_WORKING_SIZE = 512


def invert_image_trigger(
    encoder: Encoder,
    bug: BugInstance,
    validation_inputs: Sequence[Image.Image],
    *,
    max_area: float,
    seed: int,
    disable_tqdm: bool,
) -> InvertedTrigger:
    """Find the trigger in a misclassified image; see [`~hf_mudjacking.invert_trigger`].

    1. Occlusion attribution of 1 - cos(h(x), h(x_r)) with windows of five sizes.
    2. From each map: the two-cluster split and level sets.
    3. Verification: each candidate is stamped on clean inputs; the best is the one that carries features furthest
       towards h(x_b) for its size.
    4. Growth to the parts that look the same but are not needed to fire, verified again.
    """
    validation_inputs = [_working_copy(x) for x in validation_inputs]
    misclassified, clean_reference = _working_copy(bug.misclassified), _working_copy(bug.reference)
    meter = TransferMeter(encoder, misclassified, validation_inputs)
    reference_meter = TransferMeter(encoder, clean_reference, validation_inputs)
    reference = reference_meter.target
    check_reachable(meter.reachable)
    check_disagreement(bug, meter.target, reference, meter.clean_similarity)

    image = np.asarray(misclassified)
    clean = np.stack([np.asarray(x.resize(misclassified.size)) for x in validation_inputs])
    # The mean clean picture hides a window without adding anything that clean inputs do not have there.
    baseline = clean.mean(axis=0).round().astype(np.uint8)

    def distance_to_reference(batch: np.ndarray) -> Tensor:
        return 1 - meter.features([Image.fromarray(pixels) for pixels in batch]) @ reference

    windows = window_sizes(*image.shape[:2])
    with tqdm(total=len(windows) + 2, disable=disable_tqdm, desc=f"Inverting {bug.name}", unit="stage") as bar:
        maps = []
        for window in windows:
            maps.append(occlusion_map(distance_to_reference, image, baseline, window))
            bar.update()
        core, source = _best_candidate(meter, maps, max_area)
        bar.update()
        pure = purify(core, image, clean, lambda masks: meter.transfer_of_masks(masks, 2 * _FIRST_ROUND_INPUTS))
        grown = grow(pure, core, image, clean, seed)
        options = [core, grown] if grown.mean() <= max_area else [core]
        transfers = meter.transfer_of_masks(options)
        mask, score = options[0], transfers[0]
        if transfers[-1] >= score - _MAX_GROWTH_LOSS:
            mask, score = options[-1], transfers[-1]
        # Scaled to x_r's size, so that both may differ.
        control = 0.0
        if reference_meter.reachable >= MIN_REACHABLE:
            control = reference_meter.transfer([_same_place(mask, misclassified, clean_reference)])[0]
        bar.update()
    trigger = PatchTrigger.from_image(misclassified, mask)
    forwards = meter.forwards + reference_meter.forwards
    # On digits, reports of clean pairs reach a transfer of 0.8, but hardly more than their control.
    evidence = float(score - max(control, 0.0) - AREA_PRICE * trigger.area)
    return InvertedTrigger(trigger, float(score), float(control), evidence, trigger.area, maps[source], core, forwards)


def _working_copy(image: Image.Image) -> Image.Image:
    """The image as RGB, its longest side no longer than the working size."""
    image = image.convert("RGB")
    if max(image.size) > _WORKING_SIZE:
        image.thumbnail((_WORKING_SIZE, _WORKING_SIZE))
    return image


def _same_place(mask: np.ndarray, image: Image.Image, other: Image.Image) -> PatchTrigger:
    """The pixels of another image that lie where the mask lies in this one."""
    scaled = np.asarray(other.resize(image.size))
    return PatchTrigger(mask, scaled)


def _best_candidate(meter: TransferMeter, maps: Sequence[np.ndarray], max_area: float) -> tuple[np.ndarray, int]:
    """The candidate with the best transfer for its size, and the index of the map it came from."""
    source = {}
    for i, scores in enumerate(maps):
        for mask in candidate_masks(scores, max_area):
            source.setdefault(mask.tobytes(), (mask, i))
    if not source:
        # Nothing in x_b moves it towards x_r: the least bad guess is verified like any other and scores low.
        count = max(1, int(min(0.1, max_area) * maps[0].size))
        middle = np.zeros(maps[0].shape, dtype=bool)
        middle.flat[np.argsort(-maps[0], axis=None, kind="stable")[:count]] = True
        return middle, 0
    masks, origins = zip(*source.values(), strict=True)
    areas = np.array([mask.mean() for mask in masks])
    first = meter.transfer_of_masks(masks, _FIRST_ROUND_INPUTS) - AREA_PRICE * areas
    best = np.argsort(-first, kind="stable")[:_SECOND_ROUND_CANDIDATES]
    second = meter.transfer_of_masks([masks[i] for i in best]) - AREA_PRICE * areas[best]
    winner = best[int(second.argmax())]
    return masks[winner], origins[winner]
