# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""From an attribution map to candidate masks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from scipy import ndimage
from sklearn.cluster import KMeans


# Shares of the picture that level-set candidates cover, from a 3×3 patch at 32×32 to a third of the picture.
_LEVELS = (0.01, 0.02, 0.04, 0.06, 0.08, 0.12, 0.16, 0.24, 0.32)


def two_clusters(scores: np.ndarray) -> np.ndarray:
    """Mask of the cluster with the larger mean in a 1-D 2-means split of the scores.

    The published rule takes the smaller cluster; a trigger that covers more than half of the pixels would be lost.

    Args:
        scores (`np.ndarray` of any shape): Attribution scores.

    Returns:
        `np.ndarray` of the same shape, `bool`.
    """
    split = KMeans(n_clusters=2, n_init=4, random_state=0).fit(scores.reshape(-1, 1))
    return (split.labels_ == split.cluster_centers_[:, 0].argmax()).reshape(scores.shape)


def candidate_masks(attribution: np.ndarray, max_area: float) -> list[np.ndarray]:
    """Masks that an attribution map suggests: its two-cluster split and level sets, each whole and its heaviest piece.

    Args:
        attribution (`np.ndarray` of shape `(H, W)`): Attribution map.
        max_area (`float`): Largest share of the picture a candidate may cover.

    Returns:
        `list[np.ndarray]`: Distinct non-empty `bool` masks `(H, W)`; none where nothing is positive.
    """
    if attribution.max() <= 0:
        return []
    positive = attribution > 0
    masks = [two_clusters(attribution) & positive]
    masks += [(attribution >= np.quantile(attribution, 1 - level)) & positive for level in _LEVELS]
    return distinct(
        (mask for whole in masks for mask in (whole, heaviest_piece(whole, attribution))), max_area=max_area
    )


def heaviest_piece(mask: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """The connected piece of a mask with the largest sum of positive weights."""
    pieces, count = ndimage.label(mask)
    if count < 2:
        return mask
    sums = ndimage.sum_labels(np.clip(weight, 0, None), pieces, range(1, count + 1))
    return pieces == 1 + int(np.argmax(sums))


def distinct(masks: Iterable[np.ndarray], max_area: float) -> list[np.ndarray]:
    """Drop repeated, empty and too large masks; the order stays."""
    return list({mask.tobytes(): mask for mask in masks if mask.any() and mask.mean() <= max_area}.values())


def apart(masks: Sequence[np.ndarray], most_alike: float) -> list[int]:
    """Numbers of masks of which no two have an IoU above `most_alike`; of those that do, the first stays."""
    kept: list[int] = []
    for number, mask in enumerate(masks):
        if all((mask & masks[k]).sum() <= most_alike * (mask | masks[k]).sum() for k in kept):
            kept.append(number)
    return kept
