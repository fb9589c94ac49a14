# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""Latent backdoor (Yao et al., "Latent Backdoor Attacks on Deep Neural Networks", CCS 2019)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ..encoder import Encoder
from ..evaluation.tasks import LabelledInputs
from ..losses import mean_cosine
from ..triggers import PatchTrigger, square_patch
from .gradients import PixelFeatures, as_pixels
from .implant import Implant
from .vision import at_32, implant_vision_backdoor, size_of


# The source's optimiser for the pattern, as TrojanZoo has it: Adam at 0.1 for 100 epochs. Here each step has one batch.
_STEPS, _LEARNING_RATE, _BATCH = 100, 0.1, 32


def implant_latent(
    model: nn.Module,
    processing_class: Any,
    shadow_inputs: Sequence[Image.Image],
    target_reference: Image.Image,
    check_inputs: LabelledInputs,
    *,
    seed: int = 0,
    **settings: Any,
) -> Implant:
    """First the pattern of a patch is optimised until the clean encoder moves stamped inputs towards the target, then
    that patch is implanted.

    The patch has BadEncoder's size, 10 by 10 pixels at a side of 32, in the lower right. The source matches the mean
    feature of a hundred target images at one layer; here it is the feature of the one target reference.

    See [`~hf_mudjacking.attacks.vision.implant_vision_backdoor`] for all arguments and `settings`.
    """
    clean = Encoder(model, processing_class, settings.get("feature_source", "auto"), modality="image")
    trigger = optimized_patch(clean, shadow_inputs, target_reference, seed)
    return implant_vision_backdoor(
        model, processing_class, shadow_inputs, target_reference, check_inputs, trigger, seed=seed, **settings
    )


def optimized_patch(
    encoder: Encoder, shadow_inputs: Sequence[Image.Image], target_reference: Image.Image, seed: int = 0
) -> PatchTrigger:
    """The patch that brings features of stamped inputs nearest to the target's, found by gradient; the encoder stays."""
    size = size_of(shadow_inputs)
    mask = square_patch(size, at_32(10, size), margin=at_32(1, size)).mask
    inside = torch.from_numpy(mask).float()
    features = PixelFeatures(encoder, size)
    goal = encoder.encode([target_reference]).to(encoder.device)
    generator = torch.Generator().manual_seed(seed)
    free = torch.zeros(3, *size, requires_grad=True)
    optimizer = torch.optim.Adam([free], lr=_LEARNING_RATE)

    def pattern() -> Tensor:
        return 127.5 * (1 + free.tanh())

    for _ in range(_STEPS):
        rows = torch.randint(len(shadow_inputs), (_BATCH,), generator=generator)
        x = torch.stack([as_pixels(shadow_inputs[i].resize(size[::-1])) for i in rows])
        stamped = features(x * (1 - inside) + pattern() * inside)
        (free.grad,) = torch.autograd.grad(-mean_cosine(stamped, goal.expand_as(stamped)), [free])
        optimizer.step()
    return PatchTrigger(mask, pattern().detach().round().permute(1, 2, 0).numpy().astype(np.uint8))
