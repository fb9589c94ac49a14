# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""Gradients of features with respect to raw pixels, through an image processor that has none."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from ..bug_instance import to_rgb
from ..encoder import Encoder


class PixelFeatures:
    """Features of pictures given as tensors: their values are exact, their gradients go around the processor.

    The processor's resizing is taken for bilinear and its normalisation for linear, whose slope is read from a black and
    a white picture. A processor that crops gives gradients at places that are off by the crop.

    Args:
        encoder (`Encoder`): A vision encoder.
        image_size (`tuple[int, int]`): Height and width of the raw pictures.
    """

    def __init__(self, encoder: Encoder, image_size: tuple[int, int]) -> None:
        self.encoder = encoder
        extremes = [Image.new("RGB", image_size[::-1], (level,) * 3) for level in (0, 255)]
        black, white = encoder.preprocess(extremes)["pixel_values"]
        self.slope = ((white - black) / 255).mean(dim=(1, 2), keepdim=True)

    def __call__(self, pixels: Tensor) -> Tensor:
        """L2-normalised features `(N, D)` of pictures `(N, 3, H, W)`, float, 0 to 255, on CPU."""
        levels = pixels.detach().round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
        exact = self.encoder.preprocess([Image.fromarray(picture) for picture in levels])["pixel_values"]
        smooth = interpolate(pixels, size=exact.shape[-2:], mode="bilinear", antialias=True, align_corners=False)
        if exact.shape[1] == 1:
            smooth = smooth.mean(dim=1, keepdim=True)
        smooth = self.slope * smooth
        return self.encoder.features({"pixel_values": exact + smooth - smooth.detach()})


def as_pixels(x: Image.Image) -> Tensor:
    """A picture as float32 `(3, H, W)`, 0 to 255."""
    return torch.from_numpy(np.array(to_rgb(x), dtype=np.float32)).permute(2, 0, 1)
