# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""CPU time for speed.py: on a machine that others use too, seconds on the wall say little."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


def cpu_now() -> float:
    """Seconds of CPU time of this process and of the children that it has waited for, such as compilers."""
    children = os.times()
    return time.process_time() + children.children_user + children.children_system


def cpu_of(work: Callable[[], Any]) -> float:
    """CPU seconds of some work."""
    started = cpu_now()
    work()
    return cpu_now() - started


def interleaved(works: Sequence[Callable[[], Any]], repeats: int) -> list[list[float]]:
    """CPU seconds of several pieces of work, done in turn, for each a list; once before, to warm up.

    In turn, because a core that is shared is slower at one time than at another: ratios are taken within a round.
    """
    for work in works:
        work()
    rounds = [[cpu_of(work) for work in works] for _ in range(repeats)]
    return [list(seconds) for seconds in zip(*rounds, strict=True)]


def compared(what: str, ours: list[float], other: list[float], unit: str, model: str, batch: int) -> dict[str, Any]:
    """A line of the table from seconds in milliseconds: medians, and the median of the ratios of each round."""
    ratio = statistics.median(b / a for a, b in zip(ours, other, strict=True))
    with_it, without = (round(1000 * statistics.median(values), 2) for values in (ours, other))
    return {**row(what, with_it, without, unit, model, batch, 0), "ratio": round(ratio, 2)}


def row(
    what: str,
    with_it: float | None,
    without: float | None,
    unit: str,
    model: str,
    batch: int,
    seed: int,
    unreached: float | None = None,
) -> dict[str, Any]:
    """A line of the table. What took longer than `unreached` is `None`, and the ratio then a lower bound."""  # fmt: skip
    ratio = None
    if with_it is not None and (without is not None or unreached is not None):
        ratio = round((unreached if without is None else without) / with_it, 2)
    return {
        "what": what, "with": with_it, "without": without, "ratio": ratio, "unit": unit, "model": model, "batch": batch,
        "seed": seed, **({"unreached": unreached} if without is None else {}),
    }  # fmt: skip


class StepClock(TrainerCallback):
    """CPU seconds of each training step, in the model (`model`) and in what makes its batch (`data`)."""

    def __init__(self) -> None:
        self.model: list[float] = []
        self.data: list[float] = []
        self._last = 0.0

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._last = cpu_now()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        now = cpu_now()
        self.data.append(now - self._last)
        self._last = now

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        now = cpu_now()
        self.model.append(now - self._last)
        self._last = now
