# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""What an inversion returns, and when it refuses."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from ..bug_instance import BugInstance
from ..triggers import Trigger


# What a candidate must gain in transfer to be allowed to cover the whole input instead of nothing.
AREA_PRICE = 0.5
# What x_b may owe to something else costs half as much as covering it.
UNEXPLAINED_PRICE = 0.25
# Evidence from which a report counts as explained, so that more complicated triggers are not looked for.
EXPLAINED = 0.5
# Mean cosine distance under which clean inputs count as having the same feature: transfer has nowhere to go.
MIN_REACHABLE = 1e-4


class UnverifiedTriggerError(ValueError):
    """No candidate in a report has the effect of a trigger; the report may be a natural misclassification."""


@dataclass(frozen=True)
class InvertedTrigger:
    """A trigger found in a bug report, with its evidence.

    Args:
        trigger (`Trigger`): The trigger; `trigger.apply(x)` stamps a raw input.
        score (`float`): Transfer on the validation inputs: 0 does nothing, 1 carries every input to h(x_b).
        control (`float`): Transfer of as much of x_r towards h(x_r): what clean content does by itself. A trigger's
            `score` lies far above it.
        evidence (`float`): What is left of `score` after the control and a price for how much of the input the trigger is, at
            most 1; for a trigger of one class, the share of the way that its control leaves over, less that price. Of a signal
            or a warp the control counts the less, the more it holds inputs ([`~hf_mudjacking.inversion.hold.doubt_left`]).
            Raw transfer separates badly: a third of any input carries others a good way towards it.
        area (`float`): Share of x_b that the trigger makes up, in pixels or words, 0 to 1.
        attribution (`np.ndarray` of shape `(H, W)` or `(W,)`): Occlusion map of the picture, or the score of each word.
        core (`np.ndarray` of the same shape, `bool`): The part that was found by its effect, before growth.
        forwards (`int`): Forward passes spent, in inputs.
        words (`list[str]`): The words of x_b that `attribution` is about; empty for images.
        unexplained (`float`): How far x_b still lies on the way to its feature without the trigger, 0 to 1: much if the
            trigger has parts that were not found.
        one_class (`bool`): Whether the trigger was verified only on clean inputs that resemble x_r, or x_b without it.
    """

    trigger: Trigger
    score: float
    control: float
    evidence: float
    area: float
    attribution: np.ndarray
    core: np.ndarray
    forwards: int
    words: list[str] = field(default_factory=list)
    unexplained: float = 0.0
    one_class: bool = False

    @property
    def grown(self) -> float:
        """Share of the input, 0 to 1, that is part of the trigger by its looks alone."""
        return max(self.area - float(self.core.mean()), 0.0)


def check_reachable(reachable: float) -> None:
    """Refuse validation inputs whose features are all that of x_b.

    Raises:
        ValueError: If their mean cosine distance from h(x_b) is nothing.
    """
    if reachable < MIN_REACHABLE:
        raise ValueError(
            "Every validation input already has the feature of the misclassified input: the model's features are "
            "constant, or the validation inputs are copies of it."
        )


def check_disagreement(bug: BugInstance, misclassified: Tensor, reference: Tensor, clean_similarity: Tensor) -> None:
    """Refuse a report whose inputs the encoder already sees as alike.

    Raises:
        ValueError: If x_b is no further from x_r than a tenth of its mean distance to clean inputs, or than rounding errors.
    """
    cosine = float(misclassified @ reference)
    usual = float((1 - clean_similarity).mean())
    if 1 - cosine <= max(0.1 * usual, MIN_REACHABLE):
        raise ValueError(
            f"Nothing to patch in bug instance `{bug.name}`: the model already gives its two inputs nearly the same "
            f"feature (cosine {cosine:.4f}; clean inputs have {1 - usual:.4f} on average). If they are classified "
            "differently, the cause lies in the downstream classifier."
        )
