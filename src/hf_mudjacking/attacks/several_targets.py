# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""Several triggers with several targets (Jia, Liu, Gong, "BadEncoder", IEEE S&P 2022, section on multiple target inputs)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image
from torch import nn

from ..evaluation.tasks import LabelledInputs
from .implant import Implant
from .patch_variants import corner_squares
from .vision import at_32, implant_vision_backdoor, size_of


def implant_several_targets(
    model: nn.Module,
    processing_class: Any,
    shadow_inputs: Sequence[Image.Image],
    target_reference: Image.Image,
    check_inputs: LabelledInputs,
    *,
    further_references: Sequence[Image.Image],
    seed: int = 0,
    **settings: Any,
) -> Implant:
    """A square in each of several corners, each of its own colour, each leading to a target of its own.

    Squares are 6 by 6 pixels at a side of 32; the ASR of the implant is the least of theirs.

    Args:
        further_references (`Sequence[PIL.Image.Image]`): One to three images of further target classes.

    See [`~hf_mudjacking.attacks.vision.implant_vision_backdoor`] for the other arguments and `settings`.

    Raises:
        ValueError: If there are no further references, or more than there are corners left.
    """
    if not 1 <= len(further_references) <= 3:
        raise ValueError(f"There must be one to three further references; got {len(further_references)}.")
    size = size_of(shadow_inputs)
    first, *rest = corner_squares(size, at_32(6, size))
    others = list(zip(rest, further_references, strict=False))
    return implant_vision_backdoor(
        model, processing_class, shadow_inputs, target_reference, check_inputs, first,
        others=others, seed=seed, **settings,
    )  # fmt: skip
