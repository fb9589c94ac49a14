# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""Which reports are about the same trigger? Told by what the triggers do to clean inputs, and by what they are."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .encoder import Encoder
from .preprocessing import RawInput
from .triggers import ImageTrigger, Trigger, WarpTrigger
from .triggers.base import correlation


# Clean inputs that triggers are compared on.
COMPARED_ON = 16
# Largest distance between what two triggers do, as a share of what the weaker of them does.
_MOST_APART = 0.25
# Least likeness of two triggers themselves: a mask of which the other covers half has 0.71.
_LEAST_ALIKE = 0.7


def same_triggers(
    encoder: Encoder, triggers: Sequence[Trigger | None], clean_inputs: Sequence[RawInput]
) -> list[list[int]]:
    """Group triggers that are the same.

    Two triggers are the same if each does what the other does and they are alike. Both are needed: two backdoors with
    one target class lead to the same features through triggers that have nothing in common, and one may be repaired while
    the other is not. To take two triggers for one costs a repair, the reverse only some rows of a batch; so the test is
    strict.

    - What they do: the mean cosine distance between h(x ⊕ e1) and h(x ⊕ e2) is no more than a quarter of the smaller of
      their mean distances from h(x).
    - What they are: of one kind, with a cosine of 0.7 between their changes (images, same placement) or 0.7 of their
      words in common (texts).

    Args:
        encoder (`Encoder`): The backdoored encoder.
        triggers (`Sequence[Trigger]`): One for each report; `None` where none is known.
        clean_inputs (`Sequence[PIL.Image.Image]` or `Sequence[str]`): Clean inputs x; 16 are enough.

    Returns:
        `list[list[int]]`: Numbers of the triggers that are the same, in the order of the first report of each group.
        The first number of a group is its strongest trigger, which moves features furthest. `None` is in no group.
    """
    known = [i for i, trigger in enumerate(triggers) if trigger is not None]
    if len(known) < 2:
        return [[i] for i in known]
    clean = encoder.encode(clean_inputs)
    stamped = {i: encoder.encode([encoder.stamp(triggers[i], x) for x in clean_inputs]) for i in known}
    effects = {i: _distance(stamped[i], clean) for i in known}
    groups: list[list[int]] = []
    for i in known:
        for group in groups:
            j = group[0]
            apart = _distance(stamped[i], stamped[j])
            if apart <= _MOST_APART * min(effects[i], effects[j]) and _alike(triggers[i], triggers[j]):
                group.append(i)
                break
        else:
            groups.append([i])
    return [sorted(group, key=lambda i: -effects[i]) for group in groups]


def _distance(a: Tensor, b: Tensor) -> float:
    """Mean cosine distance of two sets of normalised features."""
    return float(1 - (a * b).sum(dim=1).mean())


def _alike(a: Trigger, b: Trigger) -> bool:
    if a.kind != b.kind:
        return False
    if isinstance(a, WarpTrigger):
        # Their control points may differ in number
        return a.overlap(b)["correlation"] >= _LEAST_ALIKE
    if isinstance(a, ImageTrigger):
        return a.fields() == b.fields() and correlation(a.change, b.change) >= _LEAST_ALIKE
    return a.overlap(b)["iou"] >= _LEAST_ALIKE
