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
from .splitting import candidate_masks
from .verification import TransferMeter


# What a candidate must gain in transfer to be allowed to cover the whole picture instead of nothing.
_AREA_PRICE = 0.5
# Clean inputs a candidate is tried on in the first round, and candidates that go on to the second.
_FIRST_ROUND_INPUTS = 4
_SECOND_ROUND_CANDIDATES = 6
# Growth is taken back if it costs more transfer than this.
_MAX_GROWTH_LOSS = 0.05
# Mean cosine distance under which clean inputs count as having the same feature: transfer has nowhere to go.
_MIN_REACHABLE = 1e-4
# Longest side in pixels at which a picture is searched; larger ones are shrunk, and the trigger scales with the picture.
_WORKING_SIZE = 512


class UnverifiedTriggerError(ValueError):
    """No candidate in a report has the effect of a trigger; the report may be a natural misclassification."""


@dataclass(frozen=True)
class InvertedTrigger:
    """A trigger found in a bug report, with its evidence.

    Args:
        trigger (`PatchTrigger`): The trigger; `trigger.apply(x)` stamps a raw image.
        score (`float`): Transfer on the validation inputs: 0 does nothing, 1 carries every input to h(x_b).
        control (`float`): Transfer of the same pixels of x_r towards h(x_r): what a clean picture's content does by
            itself. A trigger's `score` lies far above it.
        attribution (`np.ndarray` of shape `(H, W)`): Occlusion map of the window that led to it.
        core (`np.ndarray` of shape `(H, W)`, `bool`): The part that was found by its effect, before growth.
        forwards (`int`): Forward passes spent, in images.
    """

    trigger: PatchTrigger
    score: float
    control: float
    attribution: np.ndarray
    core: np.ndarray
    forwards: int

    @property
    def evidence(self) -> float:
        """Transfer beyond what clean content does under the same mask and what the area alone is worth, -1.5 to 1.

        Raw transfer separates badly: a third of any picture carries others a good way towards it. On digits reports of
        clean pairs reach a transfer of 0.8, but hardly any evidence.
        """
        return self.score - max(self.control, 0.0) - _AREA_PRICE * self.area

    @property
    def area(self) -> float:
        """Share of the picture the trigger covers, 0 to 1."""
        return self.trigger.area


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
        `InvertedTrigger`: The trigger with its transfer, control, attribution map and cost. Little `evidence` says that
        no local trigger explains the report.

    Raises:
        TypeError: If the report is a text.
        ValueError: If there are fewer than 4 validation inputs, x_b and x_r already agree ("nothing to
            patch"), or clean inputs all have the feature of x_b.
    """
    if bug.modality != "image":
        raise TypeError(f"Bug instance `{bug.name}` is a text; this version inverts triggers of images.")
    if len(validation_inputs) < _FIRST_ROUND_INPUTS:
        raise ValueError(
            f"Verification needs at least {_FIRST_ROUND_INPUTS} clean inputs, better 32; got {len(validation_inputs)}."
        )
    encoder = model if isinstance(model, Encoder) else Encoder(model, processing_class, feature_source)
    validation_inputs = [_working_copy(x) for x in validation_inputs]
    misclassified, clean_reference = _working_copy(bug.misclassified), _working_copy(bug.reference)
    meter = TransferMeter(encoder, misclassified, validation_inputs)
    reference_meter = TransferMeter(encoder, clean_reference, validation_inputs)
    reference = reference_meter.target
    if meter.reachable < _MIN_REACHABLE:
        raise ValueError(
            "Every validation input already has the feature of the misclassified input: the model's features are "
            "constant, or the validation inputs are copies of it."
        )
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
        if reference_meter.reachable >= _MIN_REACHABLE:
            control = reference_meter.transfer([_same_place(mask, misclassified, clean_reference)])[0]
        bar.update()
    trigger = PatchTrigger.from_image(misclassified, mask)
    forwards = meter.forwards + reference_meter.forwards
    return InvertedTrigger(trigger, float(score), float(control), maps[source], core, forwards)


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
    first = meter.transfer_of_masks(masks, _FIRST_ROUND_INPUTS) - _AREA_PRICE * areas
    best = np.argsort(-first, kind="stable")[:_SECOND_ROUND_CANDIDATES]
    second = meter.transfer_of_masks([masks[i] for i in best]) - _AREA_PRICE * areas[best]
    winner = best[int(second.argmax())]
    return masks[winner], origins[winner]
