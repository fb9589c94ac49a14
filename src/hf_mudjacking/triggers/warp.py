# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""Triggers that move pixels."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import grid_sample, interpolate

from .base import ImageTrigger, correlation


# Strengths of an altered warp, as multiples of the one that was found, and its noise against its root mean square.
_GAINS = (0.7, 1.2)
_NOISE = 0.15


def warp(pixels: Tensor, flow: Tensor) -> Tensor:
    """Read each pixel at a shifted place; differentiable in both.

    Args:
        pixels (`FloatTensor` of shape `(N, C, H, W)`): Pictures.
        flow (`FloatTensor` of shape `(2, h, w)` or, one for each picture, `(N, 2, h, w)`): Shift of x and y at control points, as a
            share of the picture's width and height; between the points it is bicubic.

    Returns:
        `FloatTensor` of shape `(N, C, H, W)`: Bilinear, with the border repeated outside.
    """
    height, width = pixels.shape[-2:]
    flow = flow if flow.dim() == 4 else flow[None]
    dense = interpolate(flow, size=(height, width), mode="bicubic", align_corners=True)
    y, x = torch.meshgrid(
        torch.linspace(-1, 1, height, device=pixels.device),
        torch.linspace(-1, 1, width, device=pixels.device),
        indexing="ij",
    )
    # A picture is 2 wide and high in these coordinates
    grid = torch.stack([x + 2 * dense[:, 0], y + 2 * dense[:, 1]], dim=-1).clamp(-1, 1)
    return grid_sample(pixels, grid.expand(len(pixels), -1, -1, -1), align_corners=True, padding_mode="border")


class WarpTrigger(ImageTrigger):
    """Warp the picture by a smooth field of shifts, as WaNet does (Nguyen, Tran, ICLR 2021).

    Args:
        flow (`FloatTensor` or array of shape `(2, h, w)`): Shift of x and y at control points, as a share of the picture's
            width and height.

    Raises:
        ValueError: If the field has another shape, is not finite, or is nothing.
    """

    kind: ClassVar[str] = "warp"
    area: ClassVar[float] = 1.0

    def __init__(self, flow: Tensor | np.ndarray) -> None:
        self.flow = np.asarray(flow, dtype=np.float32)
        if self.flow.ndim != 3 or self.flow.shape[0] != 2 or min(self.flow.shape[1:]) < 2:
            raise ValueError(f"A warp trigger needs a field (2, h, w) of at least 2×2 points; got {self.flow.shape}.")
        if not (np.isfinite(self.flow).all() and self.flow.any()):
            raise ValueError("A warp trigger needs a finite field that is not 0 everywhere.")

    @property
    def change(self) -> np.ndarray:
        return self.flow

    def apply(self, x: Image.Image) -> Image.Image:
        pixels = torch.from_numpy(self._pixels(x)).permute(2, 0, 1)[None]
        return self._picture(warp(pixels, torch.from_numpy(self.flow))[0].permute(1, 2, 0).numpy())

    @property
    def shift(self) -> float:
        """Mean distance from which a pixel is read, as a share of the picture's side."""
        return float(np.linalg.norm(self.flow, axis=0).mean())

    def weakened(self, factor: float) -> WarpTrigger:
        return WarpTrigger(self.flow * factor)

    def altered(self, rng: np.random.Generator) -> WarpTrigger:
        """Weaker or stronger, with some noise in it."""
        noise = rng.standard_normal(self.flow.shape) * _NOISE * np.sqrt(np.square(self.flow).mean())
        return WarpTrigger((self.flow + noise) * rng.uniform(*_GAINS))

    def tensors(self) -> dict[str, Tensor]:
        return {"flow": torch.from_numpy(self.flow.copy())}

    @classmethod
    def from_parts(cls, tensors: dict[str, Tensor], fields: dict[str, Any]) -> WarpTrigger:
        if "flow" not in tensors:
            raise ValueError("A warp trigger needs the tensor `flow`; it is missing.")
        return cls(tensors["flow"].numpy())

    def summary(self) -> dict[str, Any]:
        return {"kind": self.kind, "points": list(self.flow.shape[1:]), "shift": round(self.shift, 6)}

    def describe(self) -> str:
        return f"warp, {self.shift:.1%} of the picture's side on average"

    def overlap(self, true: WarpTrigger) -> dict[str, float]:
        """Correlation of both fields, at the control points of this one."""
        wanted = torch.from_numpy(true.flow)[None]
        wanted = interpolate(wanted, size=self.flow.shape[1:], mode="bicubic", align_corners=True)[0]
        return {"correlation": correlation(self.flow, wanted.numpy())}


def random_warp(points: int = 4, strength: float = 0.5, image_size: int = 32, seed: int = 0) -> WarpTrigger:
    """WaNet's field: uniform in [-1, 1] at points × points places, divided by its mean size, times `strength` / `image_size`.

    WaNet counts in coordinates in which a picture is 2 wide, hence the half here. k = 4, s = 0.5 in its recipe.

    Args:
        points (`int`, *optional*, defaults to 4): Control points a side (k).
        strength (`float`, *optional*, defaults to 0.5): s; at 0.5 a pixel is read a quarter of a pixel away on average.
        image_size (`int`, *optional*, defaults to 32): Side of the picture in pixels.
        seed (`int`, *optional*, defaults to 0): Seed of the field.
    """
    flow = np.random.default_rng(seed).uniform(-1, 1, (2, points, points))
    return WarpTrigger(flow / np.abs(flow).mean() * strength / image_size / 2)
