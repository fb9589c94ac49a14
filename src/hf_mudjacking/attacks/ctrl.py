# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""CTRL's trigger (Li et al., "An Embarrassingly Simple Backdoor Attack on Self-supervised Learning", ICCV 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image
from scipy.fft import idctn
from torch import nn

from ..evaluation.tasks import LabelledInputs
from ..triggers import AdditiveTrigger
from .implant import Implant
from .vision import implant_vision_backdoor, size_of


# What one level of U and of V adds to red, green and blue (BT.601 with U = 0.492 · (B - Y), V = 0.877 · (R - Y)).
FROM_U = np.array([0.0, -0.3947, 2.0321])
FROM_V = np.array([1.1398, -0.5806, 0.0])


def implant_ctrl(
    model: nn.Module,
    processing_class: Any,
    shadow_inputs: Sequence[Image.Image],
    target_reference: Image.Image,
    check_inputs: LabelledInputs,
    *,
    magnitude: float = 300.0,
    seed: int = 0,
    **settings: Any,
) -> Implant:
    """Two frequencies are added to the colour of the picture, its brightness stays; the source poisons the data of
    self-supervised training, here the trigger has BadEncoder's objective.

    Args:
        magnitude (`float`, *optional*, defaults to 300.0): What is added to each coefficient of the orthonormal DCT, for
            levels of 0 to 255 and a side of 32: two waves of at most 19 levels. 100 in CTRL, 50 in SSL-Backdoor; a small
            encoder that is given upscaled pictures did not take it at 100.

    See [`~hf_mudjacking.attacks.vision.implant_vision_backdoor`] for the other arguments and `settings`.
    """
    trigger = frequencies(size_of(shadow_inputs), magnitude)
    return implant_vision_backdoor(
        model, processing_class, shadow_inputs, target_reference, check_inputs, trigger, seed=seed, **settings
    )


def frequencies(image_size: tuple[int, int], magnitude: float) -> AdditiveTrigger:
    """The DCT coefficients (15, 15) and (31, 31) of the U and V planes, in a window of 32 by 32 as the source has it.

    Before clipping all of this is linear, hence a constant signal. In a picture of another size there is one window, the
    whole picture, in which the coefficients lie at the same share of the sides and the waves are as high.
    """
    height, width = image_size
    coefficients = np.zeros(image_size)
    for row, column in ((height // 2 - 1, width // 2 - 1), (height - 1, width - 1)):
        coefficients[row, column] = magnitude * np.sqrt(height * width) / 32
    plane = idctn(coefficients, norm="ortho")
    return AdditiveTrigger(plane[..., None] * (FROM_U + FROM_V))
