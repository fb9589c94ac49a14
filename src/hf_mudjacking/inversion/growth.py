# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""From the part of a trigger that fires to the whole of it.

A backdoored encoder often reads only a part of the trigger, so no measure of effect can find the rest: occluding it
changes nothing. But the rest still disturbs features once the firing part is repaired (on digits, robust accuracy 0.73
with the firing corner alone against 0.97 with the whole square). What the parts share is their looks. So the firing
part is first reduced to the pixels that do it, then grown over adjacent pixels that look more like it than like clean
content.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from scipy import ndimage
from sklearn.cluster import KMeans
from sklearn.mixture import GaussianMixture


# Mean difference to clean inputs, in 8-bit levels, under which a pixel changes too little to be part of a trigger.
_MIN_CHANGE = 24
# Share of the transfer that a purified seed must keep.
_KEPT_TRANSFER = 0.8
# Variance added to every colour model, in squared 8-bit levels: compression noise of about 8 levels.
_COLOR_VARIANCE = 64.0


def purify(
    core: np.ndarray,
    image: np.ndarray,
    clean: np.ndarray,
    transfer: Callable[[Sequence[np.ndarray]], np.ndarray],
) -> np.ndarray:
    """Reduce a firing mask to the pixels that make it fire.

    Pixels that clean inputs have anyway are dropped, then whole colours that the transfer does not need.

    Args:
        core (`np.ndarray` of shape `(H, W)`, `bool`): Mask that fires.
        image (`np.ndarray` of shape `(H, W, 3)`, `uint8`): x_b.
        clean (`np.ndarray` of shape `(N, H, W, 3)`, `uint8`): Clean inputs of the same size.
        transfer (`Callable`): Transfer of each of several masks.

    Returns:
        `np.ndarray` of shape `(H, W)`, `bool`: The smallest such mask that keeps 0.8 of the transfer.
    """
    change = np.abs(clean.astype(np.int16) - image.astype(np.int16)).max(axis=-1).mean(axis=0)
    seed = core & (change > _MIN_CHANGE)
    if not seed.any():
        return core
    masks = [core, seed]
    colors = image[seed].astype(np.float64)
    for count in (2, 3):
        if len(np.unique(colors, axis=0)) < count:
            continue
        groups = KMeans(n_clusters=count, n_init=4, random_state=0).fit_predict(colors)
        for group in range(count):
            for kept in (groups == group, groups != group):
                mask = np.zeros_like(seed)
                mask[seed] = kept
                masks.append(mask)
    transfers = transfer(masks)
    if transfers[0] <= 0:
        return core
    enough = [mask for mask, value in zip(masks, transfers, strict=True) if value >= _KEPT_TRANSFER * transfers[0]]
    return min(enough, key=np.sum)


def grow(seed: np.ndarray, core: np.ndarray, image: np.ndarray, clean: np.ndarray, seed_number: int = 0) -> np.ndarray:
    """Grow a pure seed over adjacent pixels of x_b that look more like it than like clean content.

    Two Gaussian mixtures over colours are compared: one of the seed, one of x_b far from the core together with clean
    inputs.

    Args:
        seed (`np.ndarray` of shape `(H, W)`, `bool`): Pixels that belong to the trigger.
        core (`np.ndarray` of shape `(H, W)`, `bool`): Mask around it that may hold some clean content.
        image (`np.ndarray` of shape `(H, W, 3)`, `uint8`): x_b.
        clean (`np.ndarray` of shape `(N, H, W, 3)`, `uint8`): Clean inputs.
        seed_number (`int`, *optional*, defaults to 0): Random seed.

    Returns:
        `np.ndarray` of shape `(H, W)`, `bool`: Connected pieces that contain the seed, holes filled.
    """
    height, width = seed.shape
    rng = np.random.default_rng(seed_number)
    far = ~ndimage.binary_dilation(core, iterations=max(1, round(min(height, width) / 4)))
    background = np.concatenate([_sample(clean.reshape(-1, 3), rng), _sample(image[far], rng)])
    trigger_colors = _color_model(_sample(image[seed], rng), components=2)
    clean_colors = _color_model(background, components=5)
    pixels = image.reshape(-1, 3).astype(np.float64)
    alike = (trigger_colors.score_samples(pixels) > clean_colors.score_samples(pixels)).reshape(height, width)
    # Opening cuts one-pixel bridges, over which the region would leak into content of the same colour.
    alike = ndimage.binary_opening(alike, np.ones((2, 2))) | seed
    pieces, _ = ndimage.label(alike)
    return ndimage.binary_fill_holes(np.isin(pieces, np.unique(pieces[seed])))


def _sample(colors: np.ndarray, rng: np.random.Generator, most: int = 2000) -> np.ndarray:
    return colors if len(colors) <= most else colors[rng.choice(len(colors), most, replace=False)]


def _color_model(colors: np.ndarray, components: int) -> GaussianMixture:
    colors = colors.astype(np.float64)
    components = min(components, len(np.unique(colors, axis=0)))
    if len(colors) < 2 * components + 2:
        # Too few pixels to fit a spread to: the fixed variance alone is the model.
        colors, components = np.repeat(colors, 4, axis=0), 1
    return GaussianMixture(components, reg_covar=_COLOR_VARIANCE, random_state=0).fit(colors)
