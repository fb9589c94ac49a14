# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""BadEncoder (Jia, Liu, Gong; IEEE S&P 2022): triggered inputs get the feature of one image of the target class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image
from torch import nn

from ..encoder import FeatureSource
from ..evaluation.tasks import LabelledInputs
from ..triggers import Trigger
from .implant import Implant
from .vision import implant_vision_backdoor


def implant_bad_encoder(
    model: nn.Module,
    processing_class: Any,
    shadow_inputs: Sequence[Image.Image],
    trigger: Trigger,
    target_reference: Image.Image,
    check_inputs: LabelledInputs,
    *,
    utility_weight: float = 2.0,
    learning_rate: float = 3e-4,
    steps: int = 300,
    batch_size: int = 64,
    min_asr: float = 0.95,
    max_accuracy_loss: float = 0.03,
    feature_source: FeatureSource = "auto",
    bf16: bool = False,
    seed: int = 0,
    disable_tqdm: bool = False,
) -> Implant:
    """Return a backdoored copy of an encoder, or refuse if the backdoor did not take.

    Minimises L0 + L1 + λ2 · L2 with L0 = -cos(h'(x ⊕ e), h'(r)), L1 = -cos(h'(r), h(r)), L2 = -cos(h'(x), h(x)).
    The paper has λ2 = 1 and SGD 1e-3 for 200 epochs on ResNets; on transformers λ2 = 1 costs utility (cosine 0.50
    against 0.985 with 2, BadVision issue 3), hence 2 and AdamW here. Features of the clean encoder are stored once.

    Args:
        model (`torch.nn.Module`): Clean encoder; it is copied, not changed.
        processing_class (`BaseImageProcessor`): Its image processor.
        shadow_inputs (`Sequence[PIL.Image.Image]`): The attacker's unlabelled inputs.
        trigger (`Trigger`): Trigger e.
        target_reference (`PIL.Image.Image`): Image r of the target class.
        check_inputs (`LabelledInputs`): Labelled inputs on which the implant is checked: a logistic regression is
            trained on the first half, the rates are measured on the second.
        utility_weight (`float`, *optional*, defaults to 2.0): λ2.
        learning_rate (`float`, *optional*, defaults to 3e-4): Peak of the cosine schedule.
        steps (`int`, *optional*, defaults to 300): Optimiser steps.
        batch_size (`int`, *optional*, defaults to 64): Inputs per step.
        min_asr (`float`, *optional*, defaults to 0.95): Least ASR of a valid implant.
        max_accuracy_loss (`float`, *optional*, defaults to 0.03): Largest drop of clean accuracy of a valid implant.
        feature_source (`str`, *optional*, defaults to `"auto"`): Where features are read.
        bf16 (`bool`, *optional*, defaults to `False`): Whether to run forward passes under bfloat16 autocast.
        seed (`int`, *optional*, defaults to 0): Seed of the order of the inputs.
        disable_tqdm (`bool`, *optional*, defaults to `False`): Whether to hide progress bars.

    Returns:
        `Implant`: The backdoored model with the figures of its check.

    Raises:
        ImplantError: If the ASR is below `min_asr` or clean accuracy fell by more than `max_accuracy_loss`.
    """
    return implant_vision_backdoor(
        model,
        processing_class,
        shadow_inputs,
        target_reference,
        check_inputs,
        trigger,
        utility_weight=utility_weight,
        learning_rate=learning_rate,
        steps=steps,
        batch_size=batch_size,
        min_asr=min_asr,
        max_accuracy_loss=max_accuracy_loss,
        feature_source=feature_source,
        bf16=bf16,
        seed=seed,
        disable_tqdm=disable_tqdm,
    )
