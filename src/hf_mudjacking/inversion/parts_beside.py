# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""What else of x_b fires beside a patch, in a model that is being repaired of that patch."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ..triggers import PatchTrigger
from .attribution import window_sizes
from .result import AREA_PRICE
from .verification import TransferMeter


# Sides of windows as shares of the picture's, how many of them go on, and how many are put together at most.
_WINDOW_SHARES = (1 / 4, 3 / 8, 1 / 2)
_GO_ON, _MOST_WINDOWS = 24, 6
# Side of the pieces that what was put together is cut into.
_PIECE_SHARE = 1 / 8
# Clean inputs that each mask is tried on.
_TRIED_ON = 4


def parts_beside(trigger: PatchTrigger, meter: TransferMeter) -> np.ndarray:
    """Mask of a patch and of what of x_b carries clean inputs furthest beside it, for its size.

    Windows are put together, in each round the one that helps most: of several parts each may do little by itself and all of
    them together much, and the strongest windows by themselves may all show the same one. Then they are cut into pieces, of
    which those stay without which clean inputs go less far.

    Args:
        trigger (`PatchTrigger`): What was found.
        meter (`TransferMeter`): Of x_b, in the model as it is now.

    Returns:
        `np.ndarray` of shape `(H, W)`, boolean.
    """
    shape = trigger.mask.shape
    if trigger.mask.all():
        return trigger.mask

    def merits(masks: list[np.ndarray]) -> np.ndarray:
        areas = np.array([mask.mean() for mask in masks])
        return meter.transfer_of_masks(masks, _TRIED_ON) - AREA_PRICE * areas

    windows = [
        window
        for size in window_sizes(*shape, _WINDOW_SHARES)
        for window in _windows(shape, size, (max(size[0] // 2, 1), max(size[1] // 2, 1)))
    ]
    mask, most = trigger.mask, -np.inf
    for number in range(_MOST_WINDOWS):
        unions = [mask | window for window in windows]
        reached = merits(unions)
        best = int(reached.argmax())
        if reached[best] <= most:
            break
        mask, most = unions[best], reached[best]
        if number == 0:
            windows = [windows[i] for i in np.argsort(-reached, kind="stable")[:_GO_ON]]

    (size,) = window_sizes(*shape, (_PIECE_SHARE,))
    cut = (piece & mask & ~trigger.mask for piece in _windows(shape, size, size))
    pieces = [piece for piece in cut if piece.any()]
    if not pieces:
        return trigger.mask
    lost = -meter.transfer_of_masks([mask & ~piece for piece in pieces], _TRIED_ON)
    order = np.argsort(-lost, kind="stable")
    counts = [*(2**k for k in range(len(pieces).bit_length())), len(pieces)]
    options = [trigger.mask | np.logical_or.reduce([pieces[i] for i in order[:count]]) for count in counts]
    return options[int(merits(options).argmax())]


def _windows(shape: tuple[int, int], size: tuple[int, int], step: tuple[int, int]) -> Iterator[np.ndarray]:
    """Masks of windows of a size, moved by a step, and cut off at the far edges where they do not fit."""
    for top in range(0, max(shape[0] - size[0], 0) + step[0], step[0]):
        for left in range(0, max(shape[1] - size[1], 0) + step[1], step[1]):
            window = np.zeros(shape, dtype=bool)
            window[top : top + size[0], left : left + size[1]] = True
            yield window
