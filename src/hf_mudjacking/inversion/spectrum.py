# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""What in a picture is unlike pictures: the part of its spectrum that clean inputs do not have.

A trigger that covers the whole picture has no place in it, but it has a place in its spectrum: natural pictures have
little energy at high frequencies and in differences of colour. Coefficients of x_b that stand out against those of
clean inputs are a first guess at a signal added to it, for no forward pass at all.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.fft import dctn, idctn
from scipy.ndimage import uniform_filter


# Orthonormal: brightness, red against blue, green against both. Natural pictures are nearly uncorrelated in these.
_OPPONENT = np.array([[1, 1, 1], [1, 0, -1], [1, -2, 1]]) / np.sqrt([[3], [2], [6]])
# Neighbouring frequencies, each way, over which a variance is averaged: few clean inputs give noisy ones.
_SMOOTHED = 2
# Variance of rounding to 8 bit and of compression, in squared levels, below which nothing stands out.
_FLOOR = 4.0


@dataclass(frozen=True)
class CleanSpectrum:
    """Mean and variance of each coefficient of clean inputs.

    Args:
        mean (`np.ndarray` of shape `(H, W, 3)`): Mean of the orthonormal DCT-II in opponent colours, in 8-bit levels.
        variance (`np.ndarray` of shape `(H, W, 3)`): Their variance, smoothed over neighbouring frequencies.
    """

    mean: np.ndarray
    variance: np.ndarray

    @classmethod
    def of(cls, images: np.ndarray) -> CleanSpectrum:
        """Measure it on clean inputs `(N, H, W, 3)`, `uint8`."""
        coefficients = spectrum(images)
        variance = coefficients.var(axis=0)
        smoothed = uniform_filter(variance, size=(2 * _SMOOTHED + 1, 2 * _SMOOTHED + 1, 1), mode="nearest")
        return cls(coefficients.mean(axis=0), np.maximum(np.maximum(variance, smoothed), _FLOOR))

    def anomaly(self, image: np.ndarray, strictness: float) -> np.ndarray:
        """The signal in a picture that clean inputs do not explain, `(H, W, 3)` in 8-bit levels.

        Each coefficient y, of clean variance σ², is shrunk by max(0, 1 - c · σ² / y²): the positive-part James-Stein rule.

        Args:
            image (`np.ndarray` of shape `(H, W, 3)`, `uint8`): x_b.
            strictness (`float`): c; 1 keeps what stands out a little, 9 what does by more than three deviations.
        """
        y = spectrum(image[None])[0] - self.mean
        kept = np.clip(1 - strictness * self.variance / np.maximum(y**2, 1e-9), 0, None)
        return inverse_spectrum(kept * y)


def spectrum(images: np.ndarray) -> np.ndarray:
    """Orthonormal DCT-II in opponent colours of pictures `(N, H, W, 3)`."""
    return dctn(images.astype(np.float64) @ _OPPONENT.T, axes=(1, 2), norm="ortho")


def inverse_spectrum(coefficients: np.ndarray) -> np.ndarray:
    """Picture `(H, W, 3)` of coefficients `(H, W, 3)`."""
    return (idctn(coefficients, axes=(0, 1), norm="ortho") @ _OPPONENT).astype(np.float32)
