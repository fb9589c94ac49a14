# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""`invert_trigger`: attribution, candidates, verification, growth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..bug_instance import BugInstance
from ..encoder import Encoder, FeatureSource
from ..triggers import PatchTrigger
from .attribution import occlusion_map, window_sizes
from .growth import grow, purify
from .splitting import candidate_masks, distinct
from .verification import TransferMeter


# What a candidate must gain in transfer to be allowed to cover the whole picture instead of nothing.
_AREA_PRICE = 0.5
# Clean inputs a candidate is tried on in the first round, and candidates that go on to the second.
_FIRST_ROUND_INPUTS = 4
_SECOND_ROUND_CANDIDATES = 6
# Growth is taken back if it costs more transfer than this.
_MAX_GROWTH_LOSS = 0.05


class UnverifiedTriggerError(ValueError):
    """No candidate in a report has the effect of a trigger; the report may be a natural misclassification."""


@dataclass(frozen=True)
class InvertedTrigger:
    """A trigger found in a bug report, with its evidence.

    Args:
        trigger (`PatchTrigger`): The trigger; `trigger.apply(x)` stamps a raw image.
        score (`float`): Transfer on the validation inputs: 0 does nothing, 1 carries every input to h(x_b).
        area (`float`): Share of the picture it covers, 0 to 1.
        attribution (`np.ndarray` of shape `(H, W)`): Occlusion map of the window that led to it.
        core (`np.ndarray` of shape `(H, W)`, `bool`): The part that was found by its effect, before growth.
        forwards (`int`): Forward passes spent, in images.
    """

    trigger: PatchTrigger
    score: float
    area: float
    attribution: np.ndarray
    core: np.ndarray
    forwards: int


def invert_trigger(
    model: nn.Module | Encoder,
    bug: BugInstance,
    validation_inputs: Sequence[Image.Image],
    processing_class: Any = None,
    feature_source: FeatureSource = "auto",
    *,
    max_area: float = 0.4,
    seed: int = 0,
    disable_tqdm: bool = True,
) -> InvertedTrigger:
    """Find the trigger in a misclassified image.

    1. Occlusion attribution of 1 - cos(h(x), h(x_r)) with windows of five sizes.
    2. From each map: the two-cluster split and level sets.
    3. Verification: each candidate is stamped on clean inputs; the best is the one that carries features furthest
       towards h(x_b) for its size.
    4. Growth to the parts that look the same but are not needed to fire, verified again.

    Args:
        model (`torch.nn.Module` or `Encoder`): Backdoored vision encoder.
        bug (`BugInstance`): The report.
        validation_inputs (`Sequence[PIL.Image.Image]`): Clean, unlabelled inputs; 16 to 64 are enough.
        processing_class (`BaseImageProcessor`, *optional*): Image processor; not needed when `model` is an `Encoder`.
        feature_source (`str`, *optional*, defaults to `"auto"`): See [`~hf_mudjacking.encoder.resolve_feature_source`].
        max_area (`float`, *optional*, defaults to 0.4): Largest share of the picture that a trigger may cover.
        seed (`int`, *optional*, defaults to 0): Seed of the colour sampling.
        disable_tqdm (`bool`, *optional*, defaults to `True`): Whether to hide the progress bar.

    Returns:
        `InvertedTrigger`: The trigger with its transfer, attribution map and cost. A low `score` says that no local
        trigger explains the report.

    Raises:
        TypeError: If the report is a text.
        ValueError: If there are fewer than 4 validation inputs, or x_b and x_r already agree ("nothing to patch").
    """
    if bug.modality != "image":
        raise TypeError(f"Bug instance `{bug.name}` is a text; this version inverts triggers of images.")
    if len(validation_inputs) < _FIRST_ROUND_INPUTS:
        raise ValueError(
            f"Verification needs at least {_FIRST_ROUND_INPUTS} clean inputs, better 32; got {len(validation_inputs)}."
        )
    encoder = model if isinstance(model, Encoder) else Encoder(model, processing_class, feature_source)
    meter = TransferMeter(encoder, bug.misclassified, validation_inputs)
    reference = meter.features([bug.reference])[0]
    check_disagreement(bug, meter.target, reference, meter.clean_similarity)

    image = np.asarray(bug.misclassified)
    size = (image.shape[1], image.shape[0])
    clean = np.stack([np.asarray(x.convert("RGB").resize(size)) for x in validation_inputs])
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
        seed_mask = purify(core, image, clean, lambda masks: meter.transfer_of_masks(masks, 2 * _FIRST_ROUND_INPUTS))
        grown = grow(seed_mask, core, image, clean, seed)
        options = distinct([core, grown], max_area=max_area)
        transfers = meter.transfer_of_masks(options)
        final = int(len(options) - 1 if transfers[-1] >= transfers[0] - _MAX_GROWTH_LOSS else 0)
        bar.update()
    trigger = PatchTrigger.from_image(bug.misclassified, options[final])
    return InvertedTrigger(trigger, float(transfers[final]), trigger.area, maps[source], core, meter.forwards)


def check_disagreement(bug: BugInstance, misclassified: Tensor, reference: Tensor, clean_similarity: Tensor) -> None:
    """Refuse a report whose inputs the encoder already sees as alike.

    Raises:
        ValueError: If x_b is nearer to x_r than a tenth of its mean distance to clean inputs.
    """
    cosine = float(misclassified @ reference)
    usual = float((1 - clean_similarity).mean())
    if 1 - cosine < 0.1 * usual:
        raise ValueError(
            f"Nothing to patch in bug instance `{bug.name}`: the model already gives its two inputs nearly the same "
            f"feature (cosine {cosine:.4f}; clean inputs have {1 - usual:.4f} on average). If they are classified "
            "differently, the cause lies in the downstream classifier."
        )


def _best_candidate(meter: TransferMeter, maps: Sequence[np.ndarray], max_area: float) -> tuple[np.ndarray, int]:
    """The candidate with the best transfer for its size, and the map it came from."""
    source = {mask.tobytes(): i for i, scores in enumerate(maps) for mask in candidate_masks(scores, max_area)}
    masks = distinct((mask for scores in maps for mask in candidate_masks(scores, max_area)), max_area)
    if not masks:
        # Nothing in x_b moves it towards x_r: the least bad guess is verified like any other and scores low.
        middle = maps[0] >= np.quantile(maps[0], 0.9)
        return middle, 0
    areas = np.array([mask.mean() for mask in masks])
    first = meter.transfer_of_masks(masks, _FIRST_ROUND_INPUTS) - _AREA_PRICE * areas
    best = np.argsort(-first, kind="stable")[:_SECOND_ROUND_CANDIDATES]
    second = meter.transfer_of_masks([masks[i] for i in best]) - _AREA_PRICE * areas[best]
    winner = masks[best[int(second.argmax())]]
    return winner, source[winner.tobytes()]
