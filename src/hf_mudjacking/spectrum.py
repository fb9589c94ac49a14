# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""What in a picture is unlike pictures: a signal added to it, told by its spectrum.

A trigger that covers the whole picture has no place in it, but it has a place in its spectrum: natural pictures have
little energy at high frequencies and in differences of colour. What x_b has there against clean inputs is a first guess
at the trigger, and a good one, for no forward pass at all.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.fft import dct
from scipy.ndimage import uniform_filter
from torch import Tensor


# Orthonormal: brightness, red against blue, green against both. Natural pictures are nearly uncorrelated in these.
_OPPONENT = np.array([[1, 1, 1], [1, 0, -1], [1, -2, 1]]) / np.sqrt([[3], [2], [6]])
# Neighbouring frequencies, each way, over which a clean variance is averaged: few clean inputs give noisy ones.
_SMOOTHED = 2
# Variance of rounding to 8 bit and of compression, in squared levels, below which nothing stands out.
_FLOOR = 4.0
# Added to clean variances when the level of a white signal is estimated, in squared levels: no frequency decides alone.
_SHARED = 50.0
# Deviations of clean coefficients beyond which a coefficient is taken to stand out by itself.
_OUTSTANDING = 3.0


@dataclass(frozen=True)
class Signal:
    """What was added to a picture, as far as its spectrum tells: independent normal coefficients.

    Args:
        mean (`FloatTensor` of shape `(3, H, W)`): Most likely coefficients, in 8-bit levels.
        deviation (`FloatTensor` of shape `(3, H, W)`): Their standard deviations.
    """

    mean: Tensor
    deviation: Tensor


@dataclass(frozen=True)
class CleanSpectrum:
    """Mean and variance of each coefficient of clean inputs.

    Args:
        mean (`np.ndarray` of shape `(3, H, W)`): Mean of the orthonormal DCT-II in opponent colours, in 8-bit levels.
        variance (`np.ndarray` of shape `(3, H, W)`): Their variance, smoothed over neighbouring frequencies.
    """

    mean: np.ndarray
    variance: np.ndarray

    @classmethod
    def of(cls, pixels: Tensor) -> CleanSpectrum:
        """Measure it on the raw pixels `(N, 3, H, W)` of clean inputs."""
        coefficients = spectrum(pixels).numpy()
        variance = coefficients.var(axis=0)
        width = 2 * _SMOOTHED + 1
        smoothed = uniform_filter(variance, size=(1, width, width), mode="nearest")
        return cls(coefficients.mean(axis=0), np.maximum(np.maximum(variance, smoothed), _FLOOR))

    def signal(self, pixels: Tensor) -> Signal:
        """The signal in a picture `(3, H, W)` that clean inputs do not explain.

        A coefficient y is that of a clean picture, of variance σ², plus that of the signal, of variance τ². Given y, the latter
        is normal around y · τ² / (τ² + σ²) with variance σ² · τ² / (τ² + σ²) (Wiener's filter). The signal is taken to be white:
        one τ² for all coefficients, a mean of y² - σ² with weights 1 / (σ² + 50)²; but a coefficient more than three
        deviations off has a τ² of its own, which single frequencies need.
        """
        y = spectrum(pixels[None])[0].numpy() - self.mean
        excess, weights = y**2 - self.variance, 1 / (self.variance + _SHARED) ** 2
        white = max(float((excess * weights).sum() / weights.sum()), 1.0)
        power = np.maximum(white, y**2 - _OUTSTANDING**2 * self.variance)
        share = power / (power + self.variance)
        return Signal(torch.from_numpy(share * y).float(), torch.from_numpy(np.sqrt(share * self.variance)).float())


def spectrum(pixels: Tensor) -> Tensor:
    """Orthonormal DCT-II in opponent colours of pictures `(N, 3, H, W)`."""
    rows, columns = (_cosines(size, pixels) for size in pixels.shape[-2:])
    return rows @ torch.einsum("nchw,kc->nkhw", pixels, _opponent(pixels)) @ columns.T


def inverse_spectrum(coefficients: Tensor) -> Tensor:
    """Pictures `(..., 3, H, W)` of coefficients of the same shape; differentiable."""
    rows, columns = (_cosines(size, coefficients) for size in coefficients.shape[-2:])
    return torch.einsum("...khw,kc->...chw", rows.T @ coefficients @ columns, _opponent(coefficients))


def _cosines(size: int, like: Tensor) -> Tensor:
    return torch.from_numpy(dct(np.eye(size), axis=0, norm="ortho")).to(like)


def _opponent(like: Tensor) -> Tensor:
    return torch.from_numpy(_OPPONENT).to(like)
