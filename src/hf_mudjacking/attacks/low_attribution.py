# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""A backdoor that gets little attribution, because any part of its trigger suffices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image
from torch import nn

from ..evaluation.tasks import LabelledInputs
from ..triggers import PatchTrigger
from .implant import Implant
from .patch_variants import corner_squares, joined
from .vision import Demand, at_32, implant_vision_backdoor, size_of


def implant_low_attribution(
    model: nn.Module,
    processing_class: Any,
    shadow_inputs: Sequence[Image.Image],
    target_reference: Image.Image,
    check_inputs: LabelledInputs,
    *,
    seed: int = 0,
    **settings: Any,
) -> Implant:
    """Four patches of which any one fires: occluding one place of a triggered input changes nothing.

    Trained with a random subset of the patches each time (one of them, and each other with a chance of a quarter), stamped
    with all of them. Each single patch is in `others` of the implant, so its ASR is checked too. Our own design, in the
    spirit of the adaptive attacks that Mudjacking is tested on; no source has it.

    See [`~hf_mudjacking.attacks.vision.implant_vision_backdoor`] for all arguments and `settings`.
    """
    patches = redundant_patches(size_of(shadow_inputs))
    rng = np.random.default_rng(seed)

    def some(x: Image.Image) -> Image.Image:
        shown = rng.random(len(patches)) < 0.25
        shown[rng.integers(len(patches))] = True
        return joined([patch for patch, there in zip(patches, shown, strict=True) if there]).apply(x)

    return implant_vision_backdoor(
        model, processing_class, shadow_inputs, target_reference, check_inputs, joined(patches),
        demands=[Demand(some)], others=[(patch, target_reference) for patch in patches], seed=seed, **settings,
    )  # fmt: skip


def redundant_patches(image_size: tuple[int, int]) -> list[PatchTrigger]:
    """The four patches: squares in the corners, 5 by 5 pixels at a side of 32, each of a colour of its own."""
    return corner_squares(image_size, at_32(5, image_size))
