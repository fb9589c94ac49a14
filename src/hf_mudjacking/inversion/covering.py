# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""x_b without a part of it: what lies under a patch is unknown, so it is covered in several ways."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image


# Clean inputs whose pixels cover a part, beside the mean picture and its colour.
_COVERS = 4


def without_part(image: np.ndarray, mask: np.ndarray, clean: Sequence[np.ndarray]) -> list[Image.Image]:
    """A picture with a part covered by the mean clean picture, by its mean colour, and by each of a few clean inputs.

    Args:
        image (`np.ndarray`): `(H, W, 3)`, uint8.
        mask (`np.ndarray`): `(H, W)`, bool; what is covered.
        clean (`Sequence[np.ndarray]`): Clean inputs of the same shape.

    Returns:
        `list[PIL.Image.Image]`: As many as there are ways, at most six.
    """
    mean = np.mean(clean, axis=0)
    ways = [mean, np.broadcast_to(mean.mean(axis=(0, 1)), image.shape), *clean[:_COVERS]]
    return [Image.fromarray(np.where(mask[..., None], way, image).round().astype(np.uint8)) for way in ways]
