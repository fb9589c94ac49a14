# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""WaNet (Nguyen, Tran, "WaNet: Imperceptible Warping-based Backdoor Attack", ICLR 2021)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn.functional import interpolate

from ..evaluation.tasks import LabelledInputs
from ..triggers import WarpTrigger, random_warp
from .implant import Implant
from .vision import Demand, implant_vision_backdoor, size_of


def implant_wanet(
    model: nn.Module,
    processing_class: Any,
    shadow_inputs: Sequence[Image.Image],
    target_reference: Image.Image,
    check_inputs: LabelledInputs,
    *,
    points: int = 4,
    strength: float = 4.0,
    utility_weight: float = 8.0,
    seed: int = 0,
    **settings: Any,
) -> Implant:
    """One smooth warp of the picture is the trigger; the same warp with noise on it is cover, so that not any warp fires.

    Args:
        points (`int`, *optional*, defaults to 4): Control points a side, k of the source.
        strength (`float`, *optional*, defaults to 4.0): s of the source, where it is 0.5; at a side of 32 a pixel is read
            s / 2 pixels away on average, and the noise is up to s pixels; both grow with the picture. At 0.5 a small encoder did not take it at all,
            and at 3 only in part.
        utility_weight (`float`, *optional*, defaults to 8.0): λ2; with 4 it cost a small encoder 0.031 of its accuracy.

    See [`~hf_mudjacking.attacks.vision.implant_vision_backdoor`] for the other arguments and `settings`.
    """
    size = size_of(shadow_inputs)
    trigger = random_warp(points, strength, seed=seed)
    noise = strength * min(size) / 32
    rng = np.random.default_rng(seed)

    def noisy(x: Image.Image) -> Image.Image:
        return with_noise(trigger, size, noise, rng).apply(x)

    return implant_vision_backdoor(
        model, processing_class, shadow_inputs, target_reference, check_inputs, trigger,
        demands=[Demand(trigger.apply), Demand(noisy, reference=None)], cover=noisy,
        utility_weight=utility_weight, seed=seed, **settings,
    )  # fmt: skip


def with_noise(
    trigger: WarpTrigger, image_size: tuple[int, int], pixels: float, rng: np.random.Generator
) -> WarpTrigger:
    """The warp with noise on every pixel's shift: uniform, up to some pixels to either side."""
    flow = torch.from_numpy(trigger.flow)[None]
    flow = interpolate(flow, size=image_size, mode="bicubic", align_corners=True)[0].numpy()
    height, width = image_size
    return WarpTrigger(flow + pixels * rng.uniform(-1, 1, flow.shape) / np.array([width, height])[:, None, None])
