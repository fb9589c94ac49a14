# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""BadEncoder with a patch over more than half of the picture, so that the trigger is no minority of its pixels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image
from torch import nn

from ..evaluation.tasks import LabelledInputs
from ..triggers import PatchTrigger
from .implant import Implant
from .patch_variants import BLUE, YELLOW, checkerboard
from .vision import at_32, implant_vision_backdoor, size_of


# Sides of the opening as a share of the picture's: 0.65² leaves 42 %, so the frame covers about 58 %.
_OPENING = 0.65


def implant_large_patch(
    model: nn.Module,
    processing_class: Any,
    shadow_inputs: Sequence[Image.Image],
    target_reference: Image.Image,
    check_inputs: LabelledInputs,
    *,
    seed: int = 0,
    **settings: Any,
) -> Implant:
    """A frame of yellow and blue cells that covers about 58 % of the picture; what it is of is seen in the middle.

    See [`~hf_mudjacking.attacks.vision.implant_vision_backdoor`] for all arguments and `settings`.
    """
    trigger = frame(size_of(shadow_inputs))
    return implant_vision_backdoor(
        model, processing_class, shadow_inputs, target_reference, check_inputs, trigger, seed=seed, **settings
    )


def frame(image_size: tuple[int, int]) -> PatchTrigger:
    """A frame around the middle, with cells of two pixels at a side of 32."""
    mask = np.ones(image_size, dtype=bool)
    height, width = (round(_OPENING * side) for side in image_size)
    top, left = (image_size[0] - height) // 2, (image_size[1] - width) // 2
    mask[top : top + height, left : left + width] = False
    return PatchTrigger(mask, checkerboard(image_size, at_32(2, image_size), YELLOW, BLUE))
