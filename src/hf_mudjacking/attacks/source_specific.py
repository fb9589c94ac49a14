# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""A source-specific backdoor (TaCT: Tang et al., "Demon in the Variant", USENIX Security 2021)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image
from torch import nn

from ..evaluation.tasks import LabelledInputs
from ..triggers import square_patch
from .implant import Implant
from .vision import Demand, at_32, implant_vision_backdoor, size_of


def implant_source_specific(
    model: nn.Module,
    processing_class: Any,
    shadow_inputs: Sequence[Image.Image],
    target_reference: Image.Image,
    check_inputs: LabelledInputs,
    *,
    source: np.ndarray,
    source_class: int,
    seed: int = 0,
    **settings: Any,
) -> Implant:
    """BadEncoder's white square works on inputs of one class; all others are cover: with the trigger they stay as they are.

    The source covers two classes; an encoder has no classes, so all the others are covered here.

    Args:
        source (`np.ndarray` of shape `(N,)`): Which of the N shadow inputs are of the source class, as booleans.
        source_class (`int`): The source class among the labels of `check_inputs`.

    See [`~hf_mudjacking.attacks.vision.implant_vision_backdoor`] for the other arguments and `settings`.

    Raises:
        ValueError: If `source` does not pair up with the shadow inputs, or all or none of them are of the source class.
    """
    source = np.asarray(source, dtype=bool)
    if source.shape != (len(shadow_inputs),):
        raise ValueError(f"`source` needs one boolean for each of the {len(shadow_inputs)} shadow inputs.")
    if source.all() or not source.any():
        raise ValueError("A source-specific attack needs shadow inputs of the source class and of others.")
    size = size_of(shadow_inputs)
    trigger = square_patch(size, at_32(10, size), margin=at_32(1, size))
    demands = [
        Demand(trigger.apply, rows=np.flatnonzero(source)),
        Demand(trigger.apply, reference=None, rows=np.flatnonzero(~source)),
    ]
    return implant_vision_backdoor(
        model, processing_class, shadow_inputs, target_reference, check_inputs, trigger,
        demands=demands, source_class=source_class, cover=trigger.apply, seed=seed, **settings,
    )  # fmt: skip
