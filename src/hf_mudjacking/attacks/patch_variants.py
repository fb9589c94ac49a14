# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""BadEncoder with other patches than a white square in the lower right: smaller, elsewhere, shaped, translucent, several."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image
from torch import nn

from ..evaluation.tasks import LabelledInputs
from ..triggers import BlendTrigger, PatchTrigger, square_patch
from .implant import Implant
from .vision import at_32, implant_vision_backdoor, size_of


RED, GREEN, BLUE, YELLOW = (230, 20, 20), (20, 200, 40), (30, 60, 230), (240, 220, 20)


def implant_small_patch(
    model: nn.Module,
    processing_class: Any,
    shadow_inputs: Sequence[Image.Image],
    target_reference: Image.Image,
    check_inputs: LabelledInputs,
    *,
    seed: int = 0,
    **settings: Any,
) -> Implant:
    """A white square of 3 by 3 pixels at a side of 32, one pixel from the lower right corner: an eleventh of
    the area of BadEncoder's.

    See [`~hf_mudjacking.attacks.vision.implant_vision_backdoor`] for all arguments and `settings`.
    """
    size = size_of(shadow_inputs)
    trigger = square_patch(size, at_32(3, size), margin=at_32(1, size))
    return implant_vision_backdoor(
        model, processing_class, shadow_inputs, target_reference, check_inputs, trigger, seed=seed, **settings
    )


def implant_upper_left_patch(
    model: nn.Module,
    processing_class: Any,
    shadow_inputs: Sequence[Image.Image],
    target_reference: Image.Image,
    check_inputs: LabelledInputs,
    *,
    seed: int = 0,
    **settings: Any,
) -> Implant:
    """BadEncoder's white square, 10 by 10 pixels at a side of 32, in the upper left corner.

    See [`~hf_mudjacking.attacks.vision.implant_vision_backdoor`] for all arguments and `settings`.
    """
    size = size_of(shadow_inputs)
    side, margin = at_32(10, size), at_32(1, size)
    trigger = rectangle(size, margin, margin, side, side, (255, 255, 255))
    return implant_vision_backdoor(
        model, processing_class, shadow_inputs, target_reference, check_inputs, trigger, seed=seed, **settings
    )


def implant_cross_patch(
    model: nn.Module,
    processing_class: Any,
    shadow_inputs: Sequence[Image.Image],
    target_reference: Image.Image,
    check_inputs: LabelledInputs,
    *,
    seed: int = 0,
    **settings: Any,
) -> Implant:
    """A cross of two colours in the lower right: arms of 10 by 4 pixels at a side of 32, one red, one blue.

    See [`~hf_mudjacking.attacks.vision.implant_vision_backdoor`] for all arguments and `settings`.
    """
    size = size_of(shadow_inputs)
    long, wide, margin = at_32(10, size), at_32(4, size), at_32(1, size)
    top, left, inset = size[0] - margin - long, size[1] - margin - long, (long - wide) // 2
    trigger = joined(
        [
            rectangle(size, top + inset, left, wide, long, RED),
            rectangle(size, top, left + inset, long, wide, BLUE),
        ]
    )
    return implant_vision_backdoor(
        model, processing_class, shadow_inputs, target_reference, check_inputs, trigger, seed=seed, **settings
    )


def implant_noise_patch(
    model: nn.Module,
    processing_class: Any,
    shadow_inputs: Sequence[Image.Image],
    target_reference: Image.Image,
    check_inputs: LabelledInputs,
    *,
    seed: int = 0,
    **settings: Any,
) -> Implant:
    """A square of uniform colour noise, fixed by the seed, 10 by 10 pixels at a side of 32, in the lower right.

    See [`~hf_mudjacking.attacks.vision.implant_vision_backdoor`] for all arguments and `settings`.
    """
    size = size_of(shadow_inputs)
    place = square_patch(size, at_32(10, size), margin=at_32(1, size)).mask
    trigger = PatchTrigger(place, np.random.default_rng(seed).integers(0, 256, (*size, 3)))
    return implant_vision_backdoor(
        model, processing_class, shadow_inputs, target_reference, check_inputs, trigger, seed=seed, **settings
    )


def implant_translucent_patch(
    model: nn.Module,
    processing_class: Any,
    shadow_inputs: Sequence[Image.Image],
    target_reference: Image.Image,
    check_inputs: LabelledInputs,
    *,
    opacity: float = 0.5,
    seed: int = 0,
    **settings: Any,
) -> Implant:
    """A square that shines through: a checkerboard of yellow and blue, 10 by 10 pixels at a side of 32, in the lower right.

    Args:
        opacity (`float`, *optional*, defaults to 0.5): Opacity of the square, above 0 to 1.

    See [`~hf_mudjacking.attacks.vision.implant_vision_backdoor`] for the other arguments and `settings`.
    """
    size = size_of(shadow_inputs)
    place = square_patch(size, at_32(10, size), margin=at_32(1, size)).mask
    trigger = BlendTrigger(checkerboard(size, at_32(2, size), YELLOW, BLUE), opacity * place)
    return implant_vision_backdoor(
        model, processing_class, shadow_inputs, target_reference, check_inputs, trigger, seed=seed, **settings
    )


def implant_four_corners(
    model: nn.Module,
    processing_class: Any,
    shadow_inputs: Sequence[Image.Image],
    target_reference: Image.Image,
    check_inputs: LabelledInputs,
    *,
    seed: int = 0,
    **settings: Any,
) -> Implant:
    """One trigger of four squares, one in each corner, 4 by 4 pixels at a side of 32, each of a colour of its own.

    See [`~hf_mudjacking.attacks.vision.implant_vision_backdoor`] for all arguments and `settings`.
    """
    size = size_of(shadow_inputs)
    trigger = joined(corner_squares(size, at_32(4, size)))
    return implant_vision_backdoor(
        model, processing_class, shadow_inputs, target_reference, check_inputs, trigger, seed=seed, **settings
    )


def rectangle(
    image_size: tuple[int, int], top: int, left: int, height: int, width: int, color: tuple[int, int, int]
) -> PatchTrigger:
    """A plain rectangle; places and lengths in pixels."""
    mask = np.zeros(image_size, dtype=bool)
    mask[top : top + height, left : left + width] = True
    return PatchTrigger(mask, np.broadcast_to(np.array(color, dtype=np.uint8), (*image_size, 3)))


def corner_squares(image_size: tuple[int, int], side: int) -> list[PatchTrigger]:
    """Red, green, blue and yellow squares in the four corners, a pixel (at a side of 32) from the border."""
    margin = at_32(1, image_size)
    low, right = image_size[0] - margin - side, image_size[1] - margin - side
    places = ((margin, margin), (margin, right), (low, margin), (low, right))
    return [
        rectangle(image_size, *place, side, side, color)
        for place, color in zip(places, (RED, GREEN, BLUE, YELLOW), strict=True)
    ]


def joined(patches: Sequence[PatchTrigger]) -> PatchTrigger:
    """One trigger of several patches; where they overlap, the later ones lie on top."""
    mask, pattern = np.zeros_like(patches[0].mask), np.zeros_like(patches[0].pattern)
    for patch in patches:
        mask = mask | patch.mask
        pattern = np.where(patch.mask[..., None], patch.pattern, pattern)
    return PatchTrigger(mask, pattern)


def checkerboard(
    image_size: tuple[int, int], cell: int, first: tuple[int, int, int], second: tuple[int, int, int]
) -> np.ndarray:
    """Cells of two colours in turn; uint8 `(H, W, 3)`."""
    rows, columns = np.indices(image_size) // cell
    odd = (rows + columns) % 2 == 1
    return np.where(odd[..., None], np.array(second), np.array(first)).astype(np.uint8)
