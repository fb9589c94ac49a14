# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""x_b without a part of it: what lies under a patch is unknown, so it is filled in from its border."""

from __future__ import annotations

import numpy as np
from PIL import Image
from scipy.sparse import coo_array
from scipy.sparse.linalg import spsolve


def filled_in(image: np.ndarray, mask: np.ndarray) -> Image.Image:
    """A picture with a part filled in smoothly from its border: each pixel there is the mean of its neighbours.

    Args:
        image (`np.ndarray`): `(H, W, 3)`, uint8.
        mask (`np.ndarray`): `(H, W)`, bool; what is filled in, not all of the picture.

    Returns:
        `PIL.Image.Image`: Of the same size.
    """
    rows, columns = np.nonzero(mask)
    number = np.zeros(mask.shape, dtype=int)
    number[rows, columns] = own = np.arange(len(rows))
    neighbours, known = np.zeros(len(rows)), np.zeros((len(rows), 3))
    pairs = []
    for down, right in ((-1, 0), (1, 0), (0, -1), (0, 1)):
        y, x = rows + down, columns + right
        inside = (y >= 0) & (y < mask.shape[0]) & (x >= 0) & (x < mask.shape[1])
        neighbours += inside
        i, y, x = own[inside], y[inside], x[inside]
        hidden = mask[y, x]
        known[i[~hidden]] += image[y[~hidden], x[~hidden]]
        pairs.append((i[hidden], number[y[hidden], x[hidden]]))
    i, j = (np.concatenate([own, *part]) for part in zip(*pairs, strict=True))
    values = np.concatenate([neighbours, np.full(len(i) - len(own), -1.0)])
    laplacian = coo_array((values, (i, j)), shape=(len(own), len(own)))
    result = image.astype(float)
    result[rows, columns] = spsolve(laplacian.tocsc(), known)
    return Image.fromarray(result.clip(0, 255).round().astype(np.uint8))
