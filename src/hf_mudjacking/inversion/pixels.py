# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""Gradients with respect to raw pixels: what an image processor does, as a differentiable function."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..bug_instance import to_rgb
from ..preprocessing import ImagePreprocessor


# Largest mean difference, in standard deviations of the processor's output, between the function and the processor itself.
_MAX_ERROR = 0.05
# Pictures that go through the processor at once when it is probed.
_PROBES = 64
# Grey that probes stand out from, and by how much: bicubic filters overshoot, which must not be clipped.
_GREY, _STEP = 127, 100


class PixelPath:
    """Resizing, cropping, padding and normalisation of pictures of one size, as two matrices and a colour transform.

    Image processors work on PIL images and give no gradients. But what they do to a picture X of a given size is linear and
    acts on rows, columns and channels apart: A · X · Bᵀ in each channel, mixed and scaled, plus what grey gives. All of that
    is read off by showing the processor single bright rows and columns, so that any processor will do.

    Args:
        preprocessor (`ImagePreprocessor`): The encoder's.
        images (`Sequence[PIL.Image.Image]`): Some pictures of one size, on which the function is compared with the
            processor.

    Raises:
        ValueError: If the processor does something else (say, stretches contrast).
    """

    def __init__(self, preprocessor: ImagePreprocessor, images: Sequence[Image.Image]) -> None:
        width, height = images[0].size
        plain = [_plain(height, width, _GREY + _STEP * color) for color in np.eye(4, 3, k=-1)]
        grey, *colors = _processed(preprocessor, plain)
        # Where the picture arrives at all; around it some processors pad.
        inside = sum((color - grey).abs() for color in colors).sum(dim=0) > 0
        if not inside.any():
            raise ValueError("The image processor gives the same for every picture: it cannot be looked through.")
        self.grey = grey
        self.mixing = torch.stack([(color - grey)[:, inside].mean(dim=1) for color in colors], dim=1) / _STEP
        self.rows = self.columns = None
        if (height, width) != tuple(grey.shape[1:]) or not self._agrees(preprocessor, images):
            gain = self.mixing.sum(dim=1) * _STEP
            self.rows, self.columns = (
                self._matrix(preprocessor, height, width, axis, gain, inside) for axis in (0, 1)
            )
            if not self._agrees(preprocessor, images):
                raise ValueError(
                    "The image processor does more than resize, crop, pad and normalise; triggers that cover the whole "
                    "picture cannot be looked for through it."
                )

    def __call__(self, pixels: Tensor) -> Tensor:
        """Model inputs `(N, C, H', W')` from raw pixels `(N, 3, H, W)`, 0 to 255; differentiable."""
        pixels = pixels - _GREY
        if self.rows is not None:
            pixels = self.rows.to(pixels.device) @ pixels @ self.columns.to(pixels.device).T
        return torch.einsum("nkhw,ck->nchw", pixels, self.mixing.to(pixels.device)) + self.grey.to(pixels.device)

    def _agrees(self, preprocessor: ImagePreprocessor, images: Sequence[Image.Image]) -> bool:
        images = list(images[:4])
        wanted = _processed(preprocessor, images)
        return bool((self(to_tensor(images)) - wanted).abs().mean() <= _MAX_ERROR * wanted.std())

    def _matrix(
        self, preprocessor: ImagePreprocessor, height: int, width: int, axis: int, gain: Tensor, inside: Tensor
    ) -> Tensor:
        """What each row (axis 0) or column (axis 1) of the picture gives to each of the output: `(H', H)` or `(W', W)`."""
        channel = int(gain.abs().argmax())
        lines = []
        for start in range(0, (height, width)[axis], _PROBES):
            probes = []
            for i in range(start, min(start + _PROBES, (height, width)[axis])):
                pixels = np.full((height, width, 3), _GREY, dtype=np.uint8)
                pixels[(i, slice(None)) if axis == 0 else (slice(None), i)] += _STEP
                probes.append(Image.fromarray(pixels))
            response = (_processed(preprocessor, probes) - self.grey)[:, channel] / gain[channel]
            across = inside.any(dim=axis)  # columns, or rows, that the picture reaches
            lines.append((response[:, :, across] if axis == 0 else response[:, across]).mean(dim=2 - axis))
        return torch.cat(lines).T.contiguous()


def to_tensor(images: Sequence[Image.Image]) -> Tensor:
    """Raw pixels `(N, 3, H, W)`, float32, 0 to 255, of pictures of one size."""
    return torch.from_numpy(np.stack([np.asarray(to_rgb(x)) for x in images])).permute(0, 3, 1, 2).float()


def to_array(pixels: Tensor) -> np.ndarray:
    """`(3, H, W)` as `(H, W, 3)`, on CPU."""
    return pixels.detach().cpu().permute(1, 2, 0).numpy()


def _plain(height: int, width: int, color: np.ndarray) -> Image.Image:
    return Image.fromarray(np.broadcast_to(color.astype(np.uint8), (height, width, 3)).copy())


def _processed(preprocessor: ImagePreprocessor, images: Sequence[Image.Image]) -> Tensor:
    return preprocessor(images)["pixel_values"].float()
