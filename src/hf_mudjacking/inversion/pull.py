# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""The second clue of a report: h(x_b) is where the trigger leads, so a trigger carries clean inputs there."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from PIL import Image
from torch import Tensor

from ..encoder import Encoder
from ..modes import comparison_mode, frozen
from .pixels import PixelPath, to_tensor


class Pull:
    """Optimises what is done to clean inputs so that their features come to lie at a target.

    Args:
        encoder (`Encoder`): Vision encoder; it is not changed.
        images (`Sequence[PIL.Image.Image]`): Clean inputs of one size.
        seed (`int`, *optional*, defaults to 0): Seed of the batches.

    Raises:
        ValueError: If there are no gradients through the image processor; see [`PixelPath`].
    """

    def __init__(self, encoder: Encoder, images: Sequence[Image.Image], seed: int = 0) -> None:
        self.encoder = encoder
        self.path = PixelPath(encoder.preprocessor, images)
        self.pixels = to_tensor(images)
        self.generator = torch.Generator().manual_seed(seed)
        # In inputs; a backward pass counts as two.
        self.forwards = 0

    def __call__(
        self,
        target: Tensor,
        parameters: list[Tensor],
        stamp: Callable[[Tensor], Tensor],
        penalty: Callable[[], Tensor],
        *,
        steps: int,
        learning_rate: float,
        batch_size: int = 16,
    ) -> None:
        """Minimise -cos(h(stamp(x)), target) + penalty() with Adam.

        Args:
            target (`FloatTensor` of shape `(D,)`): Feature to be reached.
            parameters (`list[Tensor]`): What `stamp` depends on, changed in place.
            stamp (`Callable`): Raw pixels `(N, 3, H, W)`, 0 to 255, before and after; differentiable.
            penalty (`Callable`): Scalar that grows with how unlikely the parameters are.
            steps (`int`): Optimiser steps.
            learning_rate (`float`): Adam's.
            batch_size (`int`, *optional*, defaults to 16): Clean inputs a step.
        """
        target = target.to(self.encoder.device)
        for parameter in parameters:
            parameter.requires_grad_(True)
        optimizer = torch.optim.Adam(parameters, lr=learning_rate)
        at_rest = frozen([p for p in self.encoder.model.parameters() if p.requires_grad])
        with at_rest, comparison_mode(self.encoder.model), torch.enable_grad():
            for _ in range(steps):
                rows = torch.randint(len(self.pixels), (batch_size,), generator=self.generator)
                stamped = stamp(self.pixels[rows].to(parameters[0].device)).clamp(0, 255)
                features = self.encoder.features({"pixel_values": self.path(stamped)})
                loss = penalty() - (features @ target).mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        for parameter in parameters:
            parameter.requires_grad_(False)
        self.encoder.agree_on(parameters)
        self.forwards += 3 * steps * batch_size
