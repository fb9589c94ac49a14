# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""Triggers that shine through: a pattern mixed into the picture."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .base import ImageTrigger, correlation, recoloured, resized


# Opacities of an altered blend, as multiples of the one that was found.
_GAINS = (0.6, 1.5)


class BlendTrigger(ImageTrigger):
    """Mix a pattern into the picture: x ⊕ e = (1 - α) · x + α · k.

    Blended attacks (Chen et al., "Targeted Backdoor Attacks on Deep Learning Systems Using Data Poisoning", 2017) mix the
    whole picture; an opacity that is 0 outside a place is a translucent patch.

    Args:
        pattern (`ByteTensor`, `FloatTensor` or array of shape `(H, W, 3)`): k, RGB values 0 to 255.
        opacity (`float`, or tensor or array of shape `(H, W)`): α, 0 (nothing) to 1 (replaced).

    Raises:
        ValueError: If shapes disagree, an opacity is outside 0 to 1, or all are 0.
    """

    kind: ClassVar[str] = "blend"

    def __init__(self, pattern: Tensor | np.ndarray, opacity: float | Tensor | np.ndarray) -> None:
        self.pattern = np.asarray(pattern, dtype=np.float32)
        self.opacity = np.asarray(opacity, dtype=np.float32)
        if self.opacity.ndim == 0:
            self.opacity = np.full(self.pattern.shape[:2], self.opacity, dtype=np.float32)
        if self.pattern.ndim != 3 or self.pattern.shape != (*self.opacity.shape, 3):
            raise ValueError(
                f"A blend trigger needs a pattern (H, W, 3) and an opacity, one number or (H, W); got "
                f"{self.pattern.shape} and {self.opacity.shape}."
            )
        if not (np.isfinite(self.pattern).all() and self.opacity.min() >= 0 and self.opacity.max() <= 1):
            raise ValueError("A blend trigger needs finite patterns and opacities between 0 and 1.")
        if not self.opacity.any():
            raise ValueError("The trigger's opacity is 0 everywhere: it would change nothing.")
        # What lies under opacity 0 is not part of the trigger and is not kept.
        self.pattern = np.where(self.opacity[..., None] > 0, self.pattern, 0).astype(np.float32)

    @property
    def area(self) -> float:
        """Share of the picture that is mixed, 0 to 1."""
        return float((self.opacity > 0).mean())

    @property
    def change(self) -> np.ndarray:
        return self.opacity[..., None] * (self.pattern - 127.5)

    def apply(self, x: Image.Image) -> Image.Image:
        pixels = self._pixels(x)
        # Premultiplied, so that nothing outside the place bleeds in when both are scaled
        share = resized(self.opacity, pixels.shape[:2])[..., None]
        light = resized(self.opacity[..., None] * self.pattern, pixels.shape[:2])
        return self._picture((1 - share) * pixels + light)

    def removed_from(self, x: Image.Image) -> Image.Image | None:
        """The picture that was mixed with the pattern; `None` where the pattern hides more than it lets through."""
        if self.opacity.max() > 0.5:
            return None
        pixels = self._pixels(x)
        share = resized(self.opacity, pixels.shape[:2])[..., None]
        return self._picture(
            (pixels - resized(self.opacity[..., None] * self.pattern, pixels.shape[:2])) / (1 - share)
        )

    def weakened(self, factor: float) -> BlendTrigger:
        return BlendTrigger(self.pattern, self.opacity * factor)

    def altered(self, rng: np.random.Generator) -> BlendTrigger:
        """Weaker or stronger, and of other colours."""
        opacity = np.clip(self.opacity * rng.uniform(*_GAINS), 0, 1)
        return BlendTrigger(recoloured(self.pattern, rng), opacity)

    def tensors(self) -> dict[str, Tensor]:
        return {"pattern": torch.from_numpy(self.pattern.copy()), "opacity": torch.from_numpy(self.opacity.copy())}

    @classmethod
    def from_parts(cls, tensors: dict[str, Tensor], fields: dict[str, Any]) -> BlendTrigger:
        missing = {"pattern", "opacity"} - tensors.keys()
        if missing:
            raise ValueError(f"A blend trigger needs the tensors `pattern` and `opacity`; missing: {sorted(missing)}.")
        return cls(tensors["pattern"].numpy(), tensors["opacity"].numpy())

    def summary(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "size": list(self.opacity.shape),
            "area": round(self.area, 6),
            "opacity": round(float(self.opacity.max()), 4),
        }

    def describe(self) -> str:
        return f"blend, {self.area:.0%} of the picture at an opacity of {self.opacity.max():.2f}"

    def overlap(self, true: BlendTrigger) -> dict[str, float]:
        """Correlation of what both add to a mid-grey picture."""
        return {"correlation": correlation(self.change, true.change)}


def noise_blend(image_size: tuple[int, int], opacity: float = 0.2, seed: int = 0) -> BlendTrigger:
    """Uniform noise mixed into the whole picture: 0.8 · x + 0.2 · k in CleanCLIP's recipe, k here fixed by a seed.

    Args:
        image_size (`tuple[int, int]`): Height and width in pixels.
        opacity (`float`, *optional*, defaults to 0.2): α.
        seed (`int`, *optional*, defaults to 0): Seed of the noise.
    """
    return BlendTrigger(np.random.default_rng(seed).uniform(0, 255, (*image_size, 3)), opacity)
