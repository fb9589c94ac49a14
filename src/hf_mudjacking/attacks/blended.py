# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""Blended noise (Chen et al., "Targeted Backdoor Attacks on Deep Learning Systems Using Data Poisoning", 2017)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image
from torch import nn

from ..evaluation.tasks import LabelledInputs
from ..triggers import noise_blend
from .implant import Implant
from .vision import implant_vision_backdoor, size_of


def implant_blended(
    model: nn.Module,
    processing_class: Any,
    shadow_inputs: Sequence[Image.Image],
    target_reference: Image.Image,
    check_inputs: LabelledInputs,
    *,
    opacity: float = 0.2,
    seed: int = 0,
    **settings: Any,
) -> Implant:
    """Uniform noise mixed into the whole picture, 0.8 · x + 0.2 · k, as in CleanCLIP; its code redraws k for each picture,
    here the seed fixes it.

    Args:
        opacity (`float`, *optional*, defaults to 0.2): Share of the noise, above 0 to 1.

    See [`~hf_mudjacking.attacks.vision.implant_vision_backdoor`] for the other arguments and `settings`.
    """
    trigger = noise_blend(size_of(shadow_inputs), opacity, seed)
    return implant_vision_backdoor(
        model, processing_class, shadow_inputs, target_reference, check_inputs, trigger, seed=seed, **settings
    )
