# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""Where in x_b does the difference to x_r come from? Occlusion at several scales.

The released Mudjacking code scans with one 5×5 window at stride 1: 784 forwards at 32×32, 48,400 at 224×224, and blind
to any trigger of which a part outside the window still fires. Here the windows are fractions of the picture, each
moved by half its side. Large ones come first, 83 forwards at any size; small ones only look where the large ones found
something: 325 forwards for the whole picture, a few tens for a corner of it. A quick scan takes 58 and a few tens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from captum.attr import LayerIntegratedGradients, Occlusion
from torch import Tensor, nn

from ..encoder import Encoder
from ..modes import comparison_mode, hooked
from ..two_towers import token_embeddings


@dataclass(frozen=True)
class Scan:
    """How a picture is scanned.

    Args:
        shares (`tuple[float, ...]`): Sides of the windows as shares of the picture's sides. The smallest is about the published
            one (5/32); the larger ones are needed when a part of the trigger suffices to fire it.
        coarse (`int`): How many of them, from the largest, scan the whole picture, moved by half their side. The others look
            where those found something.
        fine_step (`float`): Share of their side that the others are moved by.
    """

    shares: tuple[float, ...]
    coarse: int
    fine_step: float


FULL_SCAN = Scan((1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2), coarse=3, fine_step=0.5)
QUICK_SCAN = Scan((1 / 8, 1 / 4, 1 / 2), coarse=2, fine_step=0.75)

# What small windows look at: pixels with half of the most that a map gives to any, in maps that give half of the most in all.
_MATTERS = 0.5

# Points on the way from a text of padding to the text at which gradients are taken.
_GRADIENT_STEPS = 8

# Captum copies the picture once a window in a batch: this bounds those copies.
_MAX_BATCH_BYTES = 128 * 2**20


def window_sizes(height: int, width: int, shares: Sequence[float]) -> list[tuple[int, int]]:
    """Heights and widths in pixels of windows that are shares of a picture's sides, smallest first, at least 2×2."""
    return sorted({(max(2, round(height * share)), max(2, round(width * share))) for share in shares})


def coarse_to_fine(
    score: Callable[[np.ndarray], Tensor],
    image: np.ndarray,
    baseline: np.ndarray,
    scan: Scan,
    after_map: Callable[[], object],
) -> list[np.ndarray]:
    """Occlusion maps with windows of all sizes, the smallest first; small windows look where large ones found something.

    Args:
        score, image, baseline: As in [`occlusion_map`].
        scan ([`Scan`]): Sizes of the windows and how they are moved.
        after_map (`Callable`): Called after each.
    """
    maps: list[np.ndarray] = []
    for window in reversed(window_sizes(*image.shape[:2], scan.shares)):
        if len(maps) < scan.coarse:
            maps.append(occlusion_map(score, image, baseline, window))
        else:
            strides = [max(1, int(scan.fine_step * side)) for side in window]
            maps.append(occlusion_map(score, image, baseline, window, strides, suspicious_box(maps, window)))
        after_map()
    return maps[::-1]


def suspicious_box(maps: Sequence[np.ndarray], window: tuple[int, int]) -> tuple[slice, slice] | None:
    """Rows and columns around everything that matters in the maps so far, at least a window; `None` if nothing does."""
    strongest = max(scores.max() for scores in maps)
    if strongest <= 0:
        return None
    telling = [scores for scores in maps if scores.max() >= _MATTERS * strongest]
    matters = np.any([scores >= _MATTERS * scores.max() for scores in telling], axis=0)
    box = []
    for side, length, axis in zip(matters.shape, window, (1, 0), strict=True):
        places = np.flatnonzero(matters.any(axis=axis))
        start, stop = max(places[0] - length // 2, 0), min(places[-1] + 1 + length // 2, side)
        start = min(start, side - length)
        box.append(slice(int(start), int(max(stop, start + length))))
    return box[0], box[1]


def occlusion_map(
    score: Callable[[np.ndarray], Tensor],
    image: np.ndarray,
    baseline: np.ndarray,
    window: tuple[int, int],
    strides: Sequence[int] | None = None,
    box: tuple[slice, slice] | None = None,
) -> np.ndarray:
    """Occlusion attribution of a score over raw pixels, through captum.

    Args:
        score (`Callable`): Takes `uint8` images `(N, H, W, 3)`, gives `(N,)` scores; here 1 - cos(h(·), h(x_r)) or
            cos(h(·), h(x_b)).
        image (`np.ndarray` of shape `(H, W, 3)`, `uint8`): x_b.
        baseline (`np.ndarray` of shape `(H, W, 3)`, `uint8`): What a window is filled with.
        window (`tuple[int, int]`): Height and width of the window in pixels.
        strides (`Sequence[int]`, *optional*): Pixels that it is moved by, down and across; half of its height and width when
            absent.
        box (`tuple[slice, slice]`, *optional*): Rows and columns that are scanned; the whole picture when absent.

    Returns:
        `np.ndarray` of shape `(H, W)`: Mean fall of the score over the windows that cover a pixel; positive where
        occluding brings x_b nearer to x_r or away from h(x_b), 0 outside of the box.
    """
    rows, columns = box or (slice(None), slice(None))

    def forward(batch: Tensor) -> Tensor:
        whole = np.repeat(image[None], len(batch), axis=0)
        whole[:, rows, columns] = batch.round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
        return score(whole)

    def to_tensor(pixels: np.ndarray) -> Tensor:
        return torch.tensor(pixels, dtype=torch.float32).permute(2, 0, 1)[None]

    strides = [max(1, side // 2) for side in window] if strides is None else strides
    attribution = Occlusion(forward).attribute(
        to_tensor(image[rows, columns]),
        sliding_window_shapes=(3, *window),
        strides=(3, *strides),
        baselines=to_tensor(baseline[rows, columns]),
        perturbations_per_eval=int(np.clip(_MAX_BATCH_BYTES // (4 * image.size), 1, 64)),
    )
    scores = np.zeros(image.shape[:2], dtype=np.float32)
    scores[rows, columns] = attribution[0].mean(dim=0).numpy()
    return scores


def token_attribution(
    encoder: Encoder, text: str, places: Sequence[tuple[int, int]], reference: Tensor
) -> tuple[np.ndarray, int] | None:
    """Integrated gradients of 1 - cos(h(x), h(x_r)) over the embeddings of a text, through captum.

    Unlike a plain gradient it sees a trigger whose effect is saturated: on the way from padding to the text it is not.

    Args:
        encoder (`Encoder`): Text encoder.
        text (`str`): x_b.
        places (`Sequence[tuple[int, int]]`): Start and end in the text of its W words.
        reference (`FloatTensor` of shape `(D,)`): h(x_r).

    Returns:
        `tuple`: `np.ndarray` of shape `(W,)`, positive where a word keeps x_b away from x_r; and what it cost in forward
        passes, a backward pass counted as two. `None` if the model does not give its embeddings away as `(1, L, D)` (XLNet).
    """
    inputs = {name: tensor.to(encoder.device) for name, tensor in encoder.preprocess([text]).items()}
    ids = inputs.pop("input_ids")
    tokenizer, target = encoder.preprocessor.processing_class, reference.to(encoder.device)
    read = encoder.preprocessor.places(text)
    # Padding, of models that see it, stands behind the text
    read += [None] * (ids.shape[1] - len(read))
    special = torch.tensor([[place is None for place in read]], device=ids.device)

    def distance(token_ids: Tensor) -> Tensor:
        repeated = {name: tensor.expand(len(token_ids), -1) for name, tensor in inputs.items()}
        return 1 - encoder.features({"input_ids": token_ids, **repeated}) @ target

    with comparison_mode(encoder.model):
        embeddings = _embeddings_that_are_called(encoder.model, lambda: distance(ids), tuple(ids.shape))
        if embeddings is None:
            return None
        attribution = LayerIntegratedGradients(distance, embeddings).attribute(
            ids,
            baselines=torch.where(special, ids, torch.full_like(ids, tokenizer.pad_token_id)),
            n_steps=_GRADIENT_STEPS,
            internal_batch_size=4,
        )
    encoder.agree_on([attribution])
    scores = attribution.sum(dim=-1)[0].detach().cpu().double().numpy()
    words = np.zeros(len(places))
    for place, score in zip(read, scores, strict=True):
        if place is None:
            continue
        start, end, _ = place
        owner = next((i for i, (first, last) in enumerate(places) if first < end and start < last), None)
        if owner is not None:
            words[owner] += score
    return words, 3 * _GRADIENT_STEPS


@torch.no_grad()
def _embeddings_that_are_called(
    model: nn.Module, forward: Callable[[], Any], shape: tuple[int, int]
) -> nn.Embedding | None:
    """The module that looks up the token embeddings in a forward pass: T5's `get_input_embeddings()` is another, with the same weight."""
    named, called = token_embeddings(model), []

    def note(module: nn.Module, inputs: Any, output: Tensor) -> None:
        if tuple(output.shape[:2]) == shape:
            called.append(module)

    same = [m for m in model.modules() if isinstance(m, nn.Embedding) and m.weight is named.weight and m is not named]
    with hooked((named, *same), note):
        forward()
    # An adapter around it is called with it
    return named if named in called else next(iter(called), None)
