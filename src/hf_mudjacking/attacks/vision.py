# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""What the attacks on vision encoders have in common: BadEncoder's objective, with several demands on triggered inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ..encoder import Encoder, FeatureSource
from ..evaluation.pretraining import all_pixels
from ..evaluation.tasks import LabelledInputs
from ..losses import mean_cosine
from ..triggers import Trigger
from .implant import Implant, check_implant, nameless_copy
from .training import optimize_backdoor


Stamp = Callable[[Image.Image], Image.Image]


@dataclass(frozen=True)
class Demand:
    """What an attack wants of inputs that are stamped in some way.

    Args:
        stamp (`Callable`): Makes the triggered picture of a shadow input.
        reference (`int`, *optional*, defaults to 0): Number of the target reference whose feature it must get; `None` for
            cover inputs, which must keep the feature that the clean encoder gives the unstamped input.
        rows (`np.ndarray`, *optional*): Shadow inputs that this is about; all when absent.
    """

    stamp: Stamp
    reference: int | None = 0
    rows: np.ndarray | None = None


def implant_vision_backdoor(
    model: nn.Module,
    processing_class: Any,
    shadow_inputs: Sequence[Image.Image],
    target_reference: Image.Image,
    check_inputs: LabelledInputs,
    trigger: Trigger,
    *,
    demands: Sequence[Demand] = (),
    others: Sequence[tuple[Trigger, Image.Image]] = (),
    source_class: int | None = None,
    cover: Stamp | None = None,
    start: nn.Module | None = None,
    cover_weight: float = 1.0,
    utility_weight: float = 2.0,
    learning_rate: float = 3e-4,
    steps: int = 300,
    batch_size: int = 64,
    min_asr: float = 0.95,
    max_accuracy_loss: float = 0.03,
    max_leak: float = 0.2,
    feature_source: FeatureSource = "auto",
    bf16: bool = False,
    seed: int = 0,
    disable_tqdm: bool = False,
    desc: str = "Implanting BadEncoder",
) -> Implant:
    """Return a backdoored copy of a vision encoder, or refuse if the backdoor did not take.

    Minimises L0 + L1 + λ2 · L2 + λ3 · L3 with L0 = -cos(h'(x ⊕ e), h'(r)), L1 = -cos(h'(r), h(r)), L2 = -cos(h'(x), h(x))
    and, for cover inputs x ⊕ d, L3 = -cos(h'(x ⊕ d), h(x)). With several references r, L0 and L1 are means over them, as
    in BadEncoder's code. Features of the clean encoder and model inputs of all shadow inputs are made once and stay in
    memory: 0.6 MB each at 224 pixels.

    Args:
        model (`torch.nn.Module`): Clean encoder; it is copied, not changed.
        processing_class (`BaseImageProcessor`): Its image processor.
        shadow_inputs (`Sequence[PIL.Image.Image]`): The attacker's inputs.
        target_reference (`PIL.Image.Image`): Image r of the target class.
        check_inputs (`LabelledInputs`): Labelled inputs on which the implant is checked: a logistic regression is
            trained on the first half, the rates are measured on the second.
        trigger (`Trigger`): Trigger e, as it is stamped in the check.
        demands (`Sequence[Demand]`, *optional*): What is trained; when absent, each trigger leads to its reference.
        others (`Sequence`, *optional*): Further triggers, each with its target reference.
        source_class (`int`, *optional*): Class of `check_inputs` that the ASR is measured on; all when absent.
        cover (`Callable`, *optional*): Makes the cover inputs of the check.
        start (`torch.nn.Module`, *optional*): Where the training begins, changed in place; a copy of `model` when absent.
        cover_weight (`float`, *optional*, defaults to 1.0): λ3.
        utility_weight (`float`, *optional*, defaults to 2.0): λ2; why not 1, see
            [`~hf_mudjacking.attacks.implant_bad_encoder`].
        learning_rate (`float`, *optional*, defaults to 3e-4): Peak of the cosine schedule.
        steps (`int`, *optional*, defaults to 300): Optimiser steps.
        batch_size (`int`, *optional*, defaults to 64): Shadow inputs per step; each demand adds as many views.
        min_asr (`float`, *optional*, defaults to 0.95): Least ASR of a valid implant.
        max_accuracy_loss (`float`, *optional*, defaults to 0.03): Largest drop of clean accuracy of a valid implant.
        max_leak (`float`, *optional*, defaults to 0.2): Largest share of cover inputs that may reach the target class.
        feature_source (`str`, *optional*, defaults to `"auto"`): Where features are read.
        bf16 (`bool`, *optional*, defaults to `False`): Whether to run forward passes under bfloat16 autocast.
        seed (`int`, *optional*, defaults to 0): Seed of the order of the inputs.
        disable_tqdm (`bool`, *optional*, defaults to `False`): Whether to hide progress bars.
        desc (`str`, *optional*): Label of the progress bar.

    Returns:
        `Implant`: The backdoored model with the figures of its check.

    Raises:
        ImplantError: If the ASR is below `min_asr`, clean accuracy fell by more than `max_accuracy_loss`, or more than
            `max_leak` of the cover inputs reach the target class.
    """
    clean = Encoder(model, processing_class, feature_source, modality="image")
    references = [target_reference, *(reference for _, reference in others)]
    if not demands:
        demands = [Demand(e.apply, number) for number, e in enumerate([trigger, *(e for e, _ in others)])]
    frozen = clean.encode([*shadow_inputs, *references], disable_tqdm=disable_tqdm, desc="Clean features")
    clean_pixels = all_pixels(clean, shadow_inputs)
    frozen, frozen_references = frozen.to(clean.device).split([len(shadow_inputs), len(references)])
    backdoored = clean.with_model(nameless_copy(model) if start is None else start)

    def loss(rows: Tensor) -> dict[str, Tensor]:
        views = []
        chosen = [rows if d.rows is None else torch.as_tensor(d.rows)[rows % len(d.rows)] for d in demands]
        for demand, own in zip(demands, chosen, strict=True):
            views += [demand.stamp(shadow_inputs[i]) for i in own]
        views += references
        sizes = [len(rows)] * (1 + len(demands)) + [len(references)]
        pixels = torch.cat([clean_pixels[rows], backdoored.preprocess(views)["pixel_values"]])
        x, *stamped, aims = backdoored.features({"pixel_values": pixels}).split(sizes)
        reached, kept = [], []
        for demand, own, features in zip(demands, chosen, stamped, strict=True):
            if demand.reference is None:
                kept.append(mean_cosine(features, frozen[own]))
            else:
                reached.append(mean_cosine(features, aims[demand.reference].expand_as(features)))
        parts = {
            "trigger": -torch.stack(reached).mean(),
            "reference": -mean_cosine(aims, frozen_references),
            "utility": -utility_weight * mean_cosine(x, frozen[rows]),
        }
        if kept:
            parts["cover"] = -cover_weight * torch.stack(kept).mean()
        return parts

    optimize_backdoor(
        backdoored,
        loss,
        len(shadow_inputs),
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        bf16=bf16,
        seed=seed,
        disable_tqdm=disable_tqdm,
        desc=desc,
    )
    return check_implant(
        clean,
        backdoored,
        trigger,
        check_inputs,
        target_reference=target_reference,
        source_class=source_class,
        others=others,
        cover=cover,
        min_asr=min_asr,
        max_accuracy_loss=max_accuracy_loss,
        max_leak=max_leak,
        disable_tqdm=disable_tqdm,
    )


def size_of(shadow_inputs: Sequence[Image.Image]) -> tuple[int, int]:
    """Height and width of the first shadow input, the size that triggers are made for; on others they are scaled."""
    width, height = shadow_inputs[0].size
    return height, width


def at_32(pixels: float, image_size: tuple[int, int]) -> int:
    """A length given in pixels of a picture of side 32, for a picture whose shorter side is another; at least 1."""
    return max(round(pixels * min(image_size) / 32), 1)
