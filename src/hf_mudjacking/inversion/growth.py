# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""From the part of a trigger that fires to the whole of it.

A backdoored encoder often reads only a part of the trigger, so no measure of effect can find the rest: occluding it
changes nothing. But the rest still disturbs features once the firing part is repaired (on digits, robust accuracy 0.73
with the firing corner alone against 0.97 with the whole square). What the parts share is their looks. So the firing
part is first reduced to the pixels that do it, then grown over adjacent pixels that look more like it than like clean
content. Of content that looks alike beside it, edges tell it: what was pasted ends in a jump from one pixel to the next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
from scipy import ndimage
from sklearn.cluster import KMeans
from sklearn.mixture import GaussianMixture

from .minimum_cut import best_region


# Mean difference to clean inputs, in 8-bit levels, under which a pixel changes too little to be part of a trigger.
_MIN_CHANGE = 24
# Share of a grown mask that must be left without its spurs.
_KEPT_AREA = 0.8
# Share of its rectangle that a piece must fill to be squared off, and how sharp the rectangle's edge must be against its own.
_NEARLY_RECTANGULAR, _AS_SHARP = 0.7, 0.5
# Share of the picture up to which a hole in a grown region is filled: a larger one is an opening, as that of a frame.
_MAX_HOLE = 1 / 16
# Share of the pixels of clean inputs that look less likely than what counts as odd, and how often growth starts again from what grew.
_ODD, _MOST_ROUNDS = 0.01, 6
# Variance added to every model of looks, in squared 8-bit levels: compression noise of about 8 levels.
_VARIANCE = 64.0
# Levels that a doubling of the roughness counts as much as.
_ROUGHNESS_SCALE = 12.0
# Nats that a pixel's looks count at most, and that it loses for each 1/32 of the picture's side between it and the core.
_MOST_VOTE = 4.0
_DISTANCE_PRICE = 0.15
# Nats that a pixel's length of border costs where there is an edge, what more it costs where there is none, and the levels
# of an edge that lower this to 1/e.
_EDGE_PRICE, _NO_EDGE_PRICE, _EDGE = 1.0, 4.0, 16.0


def purify(
    core: np.ndarray,
    image: np.ndarray,
    clean: np.ndarray,
    that_keep: Callable[[Sequence[np.ndarray]], Iterable[np.ndarray]],
) -> np.ndarray:
    """Reduce a firing mask to the pixels that make it fire.

    Pixels that clean inputs have anyway are dropped, then whole colours that the transfer does not need.

    Args:
        core (`np.ndarray` of shape `(H, W)`, `bool`): Mask that fires.
        image (`np.ndarray` of shape `(H, W, 3)`, `uint8`): x_b.
        clean (`np.ndarray` of shape `(N, H, W, 3)`, `uint8`): Clean inputs of the same size.
        that_keep (`Callable`): Told several masks, gives in their order those that keep what the core does.

    Returns:
        `np.ndarray` of shape `(H, W)`, `bool`: The smallest such mask.
    """
    seed = changed(core, image, clean)
    if not seed.any():
        return core
    masks = [seed]
    colors = image[seed].astype(np.float64)
    for count in (2, 3):
        if len(np.unique(colors, axis=0)) < count:
            continue
        groups = KMeans(n_clusters=count, n_init=4, random_state=0).fit_predict(colors)
        for group in range(count):
            # Of two groups, the rest of one is the other
            for kept in (groups == group, groups != group)[: count - 1]:
                mask = np.zeros_like(seed)
                mask[seed] = kept
                masks.append(mask)
    masks.sort(key=np.sum)
    return next(iter(that_keep(masks)), core)


def changed(core: np.ndarray, image: np.ndarray, clean: np.ndarray) -> np.ndarray:
    """The pixels of a mask in which x_b is not like clean inputs; arguments as in [`purify`]."""
    change = np.abs(clean.astype(np.int16) - image.astype(np.int16)).max(axis=-1).mean(axis=0)
    return core & (change > _MIN_CHANGE)


def odd(mask: np.ndarray, image: np.ndarray, clean: np.ndarray, seed_number: int = 0) -> np.ndarray:
    """The pixels of a mask with looks that hardly any pixel of clean inputs has; arguments as in [`grow`].

    Of a frame around the picture, 62 to 96 % of what was found by its effect lay in it, of the odd pixels 99 % and more.
    """
    rng = np.random.default_rng(seed_number)
    sample = _sampled_looks(clean, rng)
    of_content = _model(sample, components=5)
    likely = of_content.score_samples(_looks(image[None])[0].reshape(-1, 4)).reshape(mask.shape)
    return mask & (likely <= np.quantile(of_content.score_samples(sample), _ODD))


def grow_on(seed: np.ndarray, image: np.ndarray, clean: np.ndarray, seed_number: int = 0) -> np.ndarray:
    """Grow a seed, then what it grew to, which shows more of the trigger's looks, until nothing changes; as [`grow`].

    A third of a large patch may lack some of its colours, and is too far from its other end.
    """
    for _ in range(_MOST_ROUNDS):
        grown = grow(seed, seed, image, clean, seed_number)
        if np.array_equal(grown, seed):
            break
        seed = grown
    return seed


def grow(seed: np.ndarray, core: np.ndarray, image: np.ndarray, clean: np.ndarray, seed_number: int = 0) -> np.ndarray:
    """Grow a seed over adjacent pixels of x_b that look more like it than like clean content.

    Two Gaussian mixtures over looks (colour and roughness) are compared: one of the seed, one of x_b far from the core
    together with clean inputs. Each pixel votes with the difference of its log-likelihoods, less a price for its distance to
    the core; a border is cheap on an edge of x_b and dear elsewhere.

    Args:
        seed (`np.ndarray` of shape `(H, W)`, `bool`): Pixels that belong to the trigger.
        core (`np.ndarray` of shape `(H, W)`, `bool`): Mask around it that may hold some clean content.
        image (`np.ndarray` of shape `(H, W, 3)`, `uint8`): x_b.
        clean (`np.ndarray` of shape `(N, H, W, 3)`, `uint8`): Clean inputs.
        seed_number (`int`, *optional*, defaults to 0): Random seed.

    Returns:
        `np.ndarray` of shape `(H, W)`, `bool`: The connected pieces of the best region that hold some of the seed, small holes
        filled; the seed where there are none.
    """
    height, width = seed.shape
    rng = np.random.default_rng(seed_number)
    far = ~ndimage.binary_dilation(core, iterations=max(1, round(min(height, width) / 4)))
    looks = _looks(image[None])[0]
    background = np.concatenate([_sampled_looks(clean, rng), _sample(looks[far], rng)])
    of_trigger = _model(_sample(looks[seed], rng), components=2)
    of_content = _model(background, components=5)
    pixels = looks.reshape(-1, 4)
    votes = (of_trigger.score_samples(pixels) - of_content.score_samples(pixels)).reshape(height, width)
    away = ndimage.distance_transform_edt(~core) * 32 / min(height, width)
    votes = np.clip(votes, -_MOST_VOTE, _MOST_VOTE) - _DISTANCE_PRICE * away
    across, down = (
        _EDGE_PRICE + _NO_EDGE_PRICE * np.exp(-np.abs(np.diff(image.astype(float), axis=axis)).max(axis=-1) / _EDGE)
        for axis in (1, 0)
    )
    region = best_region(votes, across, down)
    pieces, _ = ndimage.label(region)
    region = np.isin(pieces, np.unique(pieces[seed & region]))
    return _without_holes(region) if region.any() else seed


def without_spurs(mask: np.ndarray) -> np.ndarray:
    """A mask opened by the largest square, up to a sixth of the picture's side, that leaves most of it.

    Content that looks like the trigger and touches it grows out of its border. A repair of a trigger with spurs leaves the
    one without them alive: its border is another (IoU 0.88 left an ASR of 6 to 10 % where the true mask left 3 %).

    Args:
        mask (`np.ndarray` of shape `(H, W)`, `bool`): Grown mask.

    Returns:
        `np.ndarray` of shape `(H, W)`, `bool`: At least four fifths of it.
    """
    tidy = mask
    for side in range(2, max(min(mask.shape) // 6, 2) + 1):
        opened = ndimage.binary_opening(mask, np.ones((side, side)))
        if opened.sum() >= _KEPT_AREA * mask.sum():
            tidy = opened
    return tidy


def squared_off(mask: np.ndarray, image: np.ndarray) -> np.ndarray:
    """A mask whose pieces are rectangles, where they are nearly so and the picture has an edge on every side of the rectangle.

    Of a trigger of many colours some pixels at the border look like content, and its own edges let a cut go around them.

    Args:
        mask (`np.ndarray` of shape `(H, W)`, `bool`): Grown mask.
        image (`np.ndarray` of shape `(H, W, 3)`, `uint8`): x_b.

    Returns:
        `np.ndarray` of shape `(H, W)`, `bool`: The mask, and perhaps more.
    """
    # Differences of neighbours across and down, in 8-bit levels
    across, down = (np.abs(np.diff(image.astype(float), axis=axis)).max(axis=-1) for axis in (1, 0))
    pieces, _ = ndimage.label(mask)
    whole = mask.copy()
    for number, (rows, columns) in enumerate(ndimage.find_objects(pieces), start=1):
        piece = pieces == number
        nearly = piece[rows, columns].mean() >= _NEARLY_RECTANGULAR
        own = np.concatenate([across[np.diff(piece, axis=1)], down[np.diff(piece, axis=0)]])
        sides = [across[rows, [edge - 1]] for edge in (columns.start, columns.stop) if 0 < edge < mask.shape[1]]
        sides += [down[[edge - 1], columns] for edge in (rows.start, rows.stop) if 0 < edge < mask.shape[0]]
        if nearly and sides and min(map(np.median, sides)) >= _AS_SHARP * np.median(own):
            whole[rows, columns] = True
    return whole


def is_squared_off(mask: np.ndarray) -> bool:
    """Whether each connected piece of a mask `(H, W)` is a rectangle."""
    pieces, _ = ndimage.label(mask)
    return all((pieces[place] == number).all() for number, place in enumerate(ndimage.find_objects(pieces), start=1))


def _without_holes(region: np.ndarray) -> np.ndarray:
    holes, _ = ndimage.label(ndimage.binary_fill_holes(region) & ~region)
    sizes = np.bincount(holes.ravel())
    return region | ((holes > 0) & (sizes[holes] <= _MAX_HOLE * region.size))


def _looks(images: np.ndarray) -> np.ndarray:
    """Colour and roughness of each pixel, `(N, H, W, 4)` in 8-bit levels.

    Roughness is the second least difference to the four neighbours: it is that of a surface up to its edges.
    """
    padded = np.pad(images.astype(np.int16), ((0, 0), (1, 1), (1, 1), (0, 0)), mode="reflect")
    middle = padded[:, 1:-1, 1:-1]
    neighbours = (padded[:, :-2, 1:-1], padded[:, 2:, 1:-1], padded[:, 1:-1, :-2], padded[:, 1:-1, 2:])
    differences = np.stack([np.abs(other - middle).max(axis=-1) for other in neighbours])
    roughness = np.sort(differences, axis=0)[1]
    return np.concatenate([images, _ROUGHNESS_SCALE * np.log2(1.0 + roughness)[..., None]], axis=-1)


def _sampled_looks(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Looks of some pixels of all pictures, `(M, 4)`, computed of these alone: of 32 pictures of 512² all take two seconds."""
    count, height, width = images.shape[:3]
    pixels = _sample(np.arange(count * height * width), rng)
    number, *place = np.unravel_index(pixels, (count, height, width))
    around = np.arange(-1, 2)
    # Reflected at the rim, as in `_looks`
    rows, columns = (
        side - 1 - np.abs(side - 1 - np.abs(at[:, None] + around))
        for at, side in zip(place, (height, width), strict=True)
    )
    return _looks(images[number[:, None, None], rows[:, :, None], columns[:, None, :]])[:, 1, 1]


def _sample(values: np.ndarray, rng: np.random.Generator, most: int = 2000) -> np.ndarray:
    return values if len(values) <= most else values[rng.choice(len(values), most, replace=False)]


def _model(looks: np.ndarray, components: int) -> GaussianMixture:
    components = min(components, len(np.unique(looks, axis=0)))
    if len(looks) < 2 * components + 2:
        # Too few pixels to fit a spread to: the fixed variance alone is the model.
        looks, components = np.repeat(looks, 4, axis=0), 1
    return GaussianMixture(components, reg_covar=_VARIANCE, random_state=0).fit(looks)
