# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""What the processes of one run tell each other.

Every process must make each of these calls, in the same order; in a run of one process they cost nothing. Objects travel
between the processes of a run and are never written to a file.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist


T = TypeVar("T")


def rank_and_count() -> tuple[int, int]:
    """Number of this process, from 0, and how many there are."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def gathered(value: T) -> list[T]:
    """The value of every process, in the order of their numbers."""
    count = rank_and_count()[1]
    if count == 1:
        return [value]
    values: list[Any] = [None] * count
    dist.all_gather_object(values, value)
    return values


def from_first(value: T) -> T:
    """The value of process 0."""
    if rank_and_count()[1] == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def summed(values: Tensor, device: torch.device) -> Tensor:
    """The sum over all processes of a tensor on the CPU; they talk through a device."""
    if rank_and_count()[1] == 1:
        return values
    total = values.to(device, copy=True)
    dist.all_reduce(total)
    return total.to(values.device)


def done_by_all(work: Callable[[], T]) -> list[T]:
    """Results of a piece of work of every process.

    Raises:
        Exception: In every process, what the work of the first that failed raised: none waits for one that gave up.
    """
    result: T | None = None
    failure: Exception | None = None
    try:
        result = work()
    except Exception as error:
        failure = error
    outcomes = gathered((result, failure))
    for number, (_, error) in enumerate(outcomes):
        if error is not None:
            # One's own still knows where it came from
            raise failure if number == rank_and_count()[0] and failure is not None else error
    return [result for result, _ in outcomes]


def place_on_node() -> tuple[int, int, int]:
    """Where this process is on its machine.

    Returns:
        `tuple[int, int, int]`: Its number there, how many processes are there, and the number in the run of the first of them.
    """
    rank, count = rank_and_count()
    if count == 1:
        return 0, 1, 0
    # All launchers of several processes on a machine set it; without it a process shares with none
    number = int(os.environ.get("LOCAL_RANK", "0"))
    first = rank - number
    return number, gathered(first).count(first), first
