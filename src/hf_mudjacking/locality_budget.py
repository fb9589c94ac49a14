# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""How far a patch may move clean inputs, and the way back if it moves them further.

A report can be false: made, or mistaken, so that its "repair" damages the model. What it then moves are clean inputs, and
those most that resemble its misclassified input.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Subset
from transformers import TrainerCallback, TrainerControl, TrainerState

from .bug_instance import BugInstance
from .config import MudjackingConfig
from .data import PatchingDataset
from .encoder import Encoder


logger = logging.getLogger(__name__)

# Clean inputs that are measured.
MEASURED_ON = 256
# Share of them that counts as near to a misclassified input.
_NEAR = 0.05
# In the authors' log locality falls to a cosine of 0.90 half-way and comes back to 0.98: a run is given up early only if
# it is this many times over its budget.
_HOPELESS = 3.0
# How much further than all inputs those near a misclassified input must have moved to be named as the sign of a false report.
_STANDS_OUT = 1.5
_SIGN = (
    "inputs like the reported one moved most, as they do when a report is false and what it calls a trigger is ordinary "
    "content. Check whether the reports are true."
)


class LocalityBudgetError(RuntimeError):
    """A run moved clean inputs further than its budget allows; the model has the weights that it started with."""


def diverged(error: Exception) -> LocalityBudgetError:
    """What is said of a run whose features became NaN or infinite, which is further than any budget allows."""
    return LocalityBudgetError(
        f"The patch was rolled back: training diverged ({error}) The model has the weights that it started with. Lower "
        "`learning_rate`, or use `bf16` or float32 instead of `fp16`."
    )


@dataclass(frozen=True)
class Movement:
    """How far clean features are from their frozen ones, in mean cosine distance.

    Args:
        mean (`float`): Of all inputs that were measured.
        nearest (`list[float]`): For each report, of the 5 % whose frozen features are nearest to h(x_b).
    """

    mean: float
    nearest: list[float]


class LocalityGuard(TrainerCallback):
    """Measures how far clean inputs have moved: after a third and two thirds of the steps, and when training is over.

    Args:
        encoder (`Encoder`): The encoder that is patched.
        datasets (`Sequence[PatchingDataset]`): Clean inputs with their frozen features; up to 256 of them are measured.
        bug_instances (`list[BugInstance]`): K reports.
        misclassified (`FloatTensor` of shape `(K, D)`): Frozen features of their misclassified inputs.
        args (`MudjackingConfig`): `locality_budget`, read whenever it is checked, and the seed of the sample.
        spend (`Callable`): Told the forward passes of each measurement.
    """

    def __init__(
        self,
        encoder: Encoder,
        datasets: Sequence[PatchingDataset],
        bug_instances: list[BugInstance],
        misclassified: Tensor,
        args: MudjackingConfig,
        spend: Callable[[int], None],
    ) -> None:
        inputs = ConcatDataset([dataset.inputs for dataset in datasets])
        drawn = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(args.seed))[:MEASURED_ON]
        # Read at each use: decoded photographs would fill the memory
        self.inputs = Subset(inputs, drawn.tolist())
        self.encoder = encoder
        # Row by row: all of them together may be a mapped file larger than the memory
        features = ConcatDataset([dataset.frozen_features for dataset in datasets])
        self.frozen_features = torch.stack([features[i] for i in drawn.tolist()])
        self.bug_instances = bug_instances
        near = max(1, round(_NEAR * len(drawn)))
        # (K, near) numbers of inputs
        self.nearest = (misclassified @ self.frozen_features.T).topk(near, dim=1).indices
        self.args = args
        self.spend = spend

    @property
    def budget(self) -> float:
        """Largest mean cosine distance at the end; none is too large if the budget was taken away."""
        return math.inf if self.args.locality_budget is None else self.args.locality_budget

    def measure(self) -> Movement:
        """Compare the inputs' features with their frozen ones. All processes take part, and get the same numbers."""
        with self.encoder.over_processes():
            features = self.encoder.encode(self.inputs)
        self.spend(len(self.inputs))
        distances = 1 - (features * self.frozen_features).sum(dim=1)
        nearest = distances[self.nearest].mean(dim=1).tolist()
        return Movement(round(float(distances.mean()), 6), [round(value, 6) for value in nearest])

    def on_step_end(self, args: MudjackingConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step in (round(state.max_steps / 3), round(2 * state.max_steps / 3)):
            self._check(_HOPELESS * self.budget, f"at step {state.global_step} of {state.max_steps}")

    def check_at_the_end(self) -> Movement:
        """Measure the finished patch.

        Raises:
            LocalityBudgetError: If the mean is over the budget.
        """
        movement = self._check(self.budget, "at the end of training")
        for bug, near in zip(self.bug_instances, movement.nearest, strict=True):
            if near > max(self.budget, _STANDS_OUT * movement.mean):
                logger.warning(
                    f"Clean inputs near the misclassified input of `{bug.name}` moved by {near:.4f}, all by "
                    f"{movement.mean:.4f} on average: {_SIGN}"
                )
        return movement

    def _check(self, allowed: float, when: str) -> Movement:
        movement = self.measure()
        near = ", ".join(
            f"{value:.4f} near `{bug.name}`" for bug, value in zip(self.bug_instances, movement.nearest, strict=True)
        )
        moved = f"a mean cosine distance of {movement.mean:.4f} ({near})"
        logger.info(f"Clean inputs have moved by {moved} {when}.")
        if movement.mean <= allowed:
            return movement
        sign = _SIGN if max(movement.nearest) > _STANDS_OUT * movement.mean else "Check whether the reports are true."
        raise LocalityBudgetError(
            f"The patch was rolled back: {when} it had moved clean inputs by {moved}, and {allowed:.4g} is allowed there "
            f"(`locality_budget={self.budget}`). The model has the weights that it started with. {sign} If they are, pass "
            "more clean inputs, raise `locality_weight`, lower `learning_rate`, or take more steps; last, raise "
            "`locality_budget`."
        )
