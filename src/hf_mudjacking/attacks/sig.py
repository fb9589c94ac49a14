# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""SIG (Barni, Kallas, Tondi, "A New Backdoor Attack in CNNs by Training Set Corruption Without Label Poisoning", ICIP 2019)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image
from torch import nn

from ..evaluation.tasks import LabelledInputs
from ..triggers import AdditiveTrigger
from .implant import Implant
from .vision import implant_vision_backdoor, size_of


def implant_sig(
    model: nn.Module,
    processing_class: Any,
    shadow_inputs: Sequence[Image.Image],
    target_reference: Image.Image,
    check_inputs: LabelledInputs,
    *,
    amplitude: float = 20.0,
    periods: int = 6,
    seed: int = 0,
    **settings: Any,
) -> Implant:
    """Vertical stripes of a sine that is added to the picture.

    Args:
        amplitude (`float`, *optional*, defaults to 20.0): Δ in 8-bit levels; 20 in SSL-Backdoor, 40 in BackdoorBench.
        periods (`int`, *optional*, defaults to 6): f, periods across the picture; 6 in both.

    See [`~hf_mudjacking.attacks.vision.implant_vision_backdoor`] for the other arguments and `settings`.
    """
    trigger = sinusoid(size_of(shadow_inputs), amplitude, periods)
    return implant_vision_backdoor(
        model, processing_class, shadow_inputs, target_reference, check_inputs, trigger, seed=seed, **settings
    )


def sinusoid(image_size: tuple[int, int], amplitude: float, periods: int) -> AdditiveTrigger:
    """v(i, j) = Δ · sin(2π · j · f / m) in every channel, m being the width."""
    height, width = image_size
    row = amplitude * np.sin(2 * np.pi * np.arange(width) * periods / width)
    return AdditiveTrigger(np.broadcast_to(row[None, :, None], (height, width, 3)))
