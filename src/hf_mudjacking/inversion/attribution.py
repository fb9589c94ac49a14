# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""Where in x_b does the difference to x_r come from? Occlusion at several scales.

The released Mudjacking code scans with one 5×5 window at stride 1: 784 forwards at 32×32, 48,400 at 224×224, and blind
to any trigger of which a part outside the window still fires. Here the windows are fractions of the picture, each
moved by half its side, which costs about 400 forwards at any size.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from captum.attr import Occlusion
from torch import Tensor


# Sides of the occluding windows as shares of the picture's sides. The smallest is about the published one (5/32); the
# larger ones are needed when a part of the trigger suffices to fire it.
WINDOW_SHARES = (1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2)

# Captum copies the picture once a window in a batch: this bounds those copies.
_MAX_BATCH_BYTES = 128 * 2**20


def window_sizes(height: int, width: int) -> list[tuple[int, int]]:
    """Heights and widths in pixels of the windows for a picture of this size, smallest first, at least 2×2."""
    return sorted({(max(2, round(height * share)), max(2, round(width * share))) for share in WINDOW_SHARES})


def occlusion_map(
    score: Callable[[np.ndarray], Tensor], image: np.ndarray, baseline: np.ndarray, window: tuple[int, int]
) -> np.ndarray:
    """Occlusion attribution of a score over raw pixels, through captum.

    Args:
        score (`Callable`): Takes `uint8` images `(N, H, W, 3)`, gives `(N,)` scores; here 1 - cos(h(·), h(x_r)).
        image (`np.ndarray` of shape `(H, W, 3)`, `uint8`): x_b.
        baseline (`np.ndarray` of shape `(H, W, 3)`, `uint8`): What a window is filled with.
        window (`tuple[int, int]`): Height and width of the window in pixels; the stride is half of each.

    Returns:
        `np.ndarray` of shape `(H, W)`: Mean fall of the score over the windows that cover a pixel; positive where
        occluding brings x_b nearer to x_r.
    """

    def forward(batch: Tensor) -> Tensor:
        return score(batch.round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy())

    def to_tensor(pixels: np.ndarray) -> Tensor:
        return torch.tensor(pixels, dtype=torch.float32).permute(2, 0, 1)[None]

    attribution = Occlusion(forward).attribute(
        to_tensor(image),
        sliding_window_shapes=(3, *window),
        strides=(3, max(1, window[0] // 2), max(1, window[1] // 2)),
        baselines=to_tensor(baseline),
        perturbations_per_eval=int(np.clip(_MAX_BATCH_BYTES // (4 * image.size), 1, 64)),
    )
    return attribution[0].mean(dim=0).numpy()
