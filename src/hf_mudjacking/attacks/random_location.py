# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""Random location (Salem et al., "Dynamic Backdoor Attacks Against Machine Learning Models", EuroS&P 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image
from torch import nn

from ..evaluation.tasks import LabelledInputs
from ..triggers import PatchTrigger, square_patch
from .implant import Implant
from .vision import at_32, implant_vision_backdoor, size_of


def implant_random_location(
    model: nn.Module,
    processing_class: Any,
    shadow_inputs: Sequence[Image.Image],
    target_reference: Image.Image,
    check_inputs: LabelledInputs,
    *,
    side: int | None = None,
    seed: int = 0,
    **settings: Any,
) -> Implant:
    """A square of colour noise that is somewhere else in each picture.

    Args:
        side (`int`, *optional*): Side of the square in pixels; 8 for a picture of side 32 when absent, near the 50 of 224
            in SSL-Backdoor.

    See [`~hf_mudjacking.attacks.vision.implant_vision_backdoor`] for the other arguments and `settings`.
    """
    size = size_of(shadow_inputs)
    place = square_patch(size, at_32(8, size) if side is None else side).mask
    noise = np.random.default_rng(seed).integers(0, 256, (*size, 3))
    trigger = PatchTrigger(place, noise, placement="anywhere")
    return implant_vision_backdoor(
        model, processing_class, shadow_inputs, target_reference, check_inputs, trigger, seed=seed, **settings
    )
