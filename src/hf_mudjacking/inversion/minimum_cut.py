# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""The region of a picture that its pixels vote for, at a price for each pixel's length of its border."""

from __future__ import annotations

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import breadth_first_order, maximum_flow


# The flow is one of integers: votes and prices are kept to hundredths.
_UNITS = 100


def best_region(votes: np.ndarray, across: np.ndarray, down: np.ndarray) -> np.ndarray:
    """The region with the largest sum of votes less the price of its border; exact, by a minimum cut (Greig, Porteous,
    Seheult 1989).

    Args:
        votes (`np.ndarray` of shape `(H, W)`): For each pixel, what it is worth to have it in the region; negative if it
            should stay out.
        across (`np.ndarray` of shape `(H, W - 1)`): Price, at least 0, of a border between a pixel and the one to its right.
        down (`np.ndarray` of shape `(H - 1, W)`): Of a border between a pixel and the one below it. The rim of the picture is
            free.

    Returns:
        `np.ndarray` of shape `(H, W)`, `bool`: The smallest such region.
    """
    # SciPy's flow takes no others, and its matrices keep what they get (1.14; later ones convert)
    numbers = np.arange(votes.size, dtype=np.int32).reshape(votes.shape)
    source, sink = np.int32(votes.size), np.int32(votes.size + 1)
    inside, outside = votes > 0, votes < 0
    edges = [
        (np.full(inside.sum(), source), numbers[inside], votes[inside]),
        (numbers[outside], np.full(outside.sum(), sink), -votes[outside]),
    ]
    for first, second, price in ((numbers[:, :-1], numbers[:, 1:], across), (numbers[:-1], numbers[1:], down)):
        edges.append((first.ravel(), second.ravel(), price.ravel()))
        edges.append((second.ravel(), first.ravel(), price.ravel()))
    starts, ends, capacities = (np.concatenate(part) for part in zip(*edges, strict=True))
    size = votes.size + 2
    graph = coo_array(
        (np.round(_UNITS * capacities).astype(np.int32), (starts, ends)), shape=(size, size), dtype=np.int32
    ).tocsr()
    left = graph - maximum_flow(graph, source, sink).flow
    left.data = np.maximum(left.data, 0)
    left.eliminate_zeros()
    reached = np.zeros(size, dtype=bool)
    reached[breadth_first_order(left, source, return_predecessors=False)] = True
    return reached[: votes.size].reshape(votes.shape)
