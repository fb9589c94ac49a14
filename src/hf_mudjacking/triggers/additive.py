# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""Triggers that add a fixed signal to the picture."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..spectrum import inverse_spectrum
from .base import ImageTrigger, correlation, resized


# Strengths of an altered signal, as multiples of the one that was found.
_GAINS = (0.7, 1.5)


class AdditiveTrigger(ImageTrigger):
    """Add a signal to every pixel: x ⊕ e = clip(x + δ).

    Args:
        delta (`FloatTensor` or array of shape `(H, W, 3)`): δ in 8-bit levels, of either sign.
        spread (`FloatTensor` or array of shape `(3, H, W)`, *optional*): Standard deviations of its spectrum, where a report
            left it open; see [`~hf_mudjacking.spectrum.Signal`]. [`~AdditiveTrigger.altered`] draws from it.

    Raises:
        ValueError: If a shape is another, a value is not finite, or δ is nothing.
    """

    kind: ClassVar[str] = "additive"

    def __init__(self, delta: Tensor | np.ndarray, spread: Tensor | np.ndarray | None = None) -> None:
        self.delta = np.asarray(delta, dtype=np.float32)
        self.spread = None if spread is None else np.asarray(spread, dtype=np.float32)
        if self.delta.ndim != 3 or self.delta.shape[-1] != 3:
            raise ValueError(f"An additive trigger needs a signal (H, W, 3); got {self.delta.shape}.")
        if not np.isfinite(self.delta).all():
            raise ValueError("An additive trigger needs a finite signal.")
        if self.spread is not None and (
            self.spread.shape != (3, *self.delta.shape[:2]) or not np.isfinite(self.spread).all()
        ):
            raise ValueError(
                f"The spread of a signal {self.delta.shape} is (3, H, W) and finite; got {self.spread.shape}."
            )
        if not self.delta.any():
            raise ValueError("The trigger's signal is 0 everywhere: it would change nothing.")

    @property
    def area(self) -> float:
        """Share of the pixels that change, 0 to 1."""
        return float((np.abs(self.delta).max(axis=-1) >= 0.5).mean())

    @property
    def change(self) -> np.ndarray:
        return self.delta

    @property
    def size(self) -> float:
        """Root mean square of δ, in 8-bit levels."""
        return float(np.sqrt(np.square(self.delta).mean()))

    def apply(self, x: Image.Image) -> Image.Image:
        pixels = self._pixels(x)
        return self._picture(pixels + resized(self.delta, pixels.shape[:2]))

    def removed_from(self, x: Image.Image) -> Image.Image:
        """The picture less the signal; what was clipped stays lost."""
        pixels = self._pixels(x)
        return self._picture(pixels - resized(self.delta, pixels.shape[:2]))

    def weakened(self, factor: float) -> AdditiveTrigger:
        return AdditiveTrigger(self.delta * factor)

    def altered(self, rng: np.random.Generator) -> AdditiveTrigger:
        """Weaker or stronger, and as different as the report leaves open."""
        delta = self.delta
        if self.spread is not None:
            noise = torch.from_numpy(self.spread * rng.standard_normal(self.spread.shape).astype(np.float32))
            delta = delta + inverse_spectrum(noise).permute(1, 2, 0).numpy()
        return AdditiveTrigger(delta * rng.uniform(*_GAINS))

    def tensors(self) -> dict[str, Tensor]:
        tensors = {"delta": torch.from_numpy(self.delta.copy())}
        return tensors if self.spread is None else {**tensors, "spread": torch.from_numpy(self.spread.copy())}

    @classmethod
    def from_parts(cls, tensors: dict[str, Tensor], fields: dict[str, Any]) -> AdditiveTrigger:
        if "delta" not in tensors:
            raise ValueError("An additive trigger needs the tensor `delta`; it is missing.")
        return cls(tensors["delta"].numpy(), tensors["spread"].numpy() if "spread" in tensors else None)

    def summary(self) -> dict[str, Any]:
        return {"kind": self.kind, "size": list(self.delta.shape[:2]), "levels": round(self.size, 3)}

    def describe(self) -> str:
        return f"additive, {self.size:.1f} of 255 levels on average"

    def overlap(self, true: AdditiveTrigger) -> dict[str, float]:
        """Correlation of both signals."""
        return {"correlation": correlation(self.change, true.change)}
