# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""Which tensors differ between two models, and by how much."""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.table import Table
from rich.text import Text
from torch import Tensor

from .patches import compared


# Entries that are compared at a time, in float64.
_CHUNK = 2**22


@dataclass(frozen=True)
class TensorDifference:
    """How one tensor of the first model differs from that of the second.

    Args:
        name (`str`): Its name in the files.
        shape (`list[int]`): Its shape.
        relative (`float`, *optional*): L2 norm of the difference over that of the first; `None` where that is 0, or one of both not
            finite.
        largest (`float`, *optional*): Largest absolute difference of an entry; `None` where it is not finite.
        share (`float`): Share of the entries that differ, 0 to 1.
    """

    name: str
    shape: list[int]
    relative: float | None
    largest: float | None
    share: float


@dataclass(frozen=True)
class ModelDifference:
    """How two models differ.

    Args:
        tensors (`int`): Tensors that both have, in one shape.
        changed (`list[TensorDifference]`): Those that differ, the relatively most changed first.
        only_first (`list[str]`): Tensors that only the first has, or in another shape.
        only_second (`list[str]`): Tensors that only the second has, or in another shape.
    """

    tensors: int
    changed: list[TensorDifference]
    only_first: list[str]
    only_second: list[str]

    def record(self) -> dict[str, Any]:
        """The same, writable as json."""
        return asdict(self)


def compare_models(a: str | os.PathLike[str], b: str | os.PathLike[str]) -> ModelDifference:
    """Compare two saved models, two adapters, or a model and an adapter on it, one tensor after the other.

    Args:
        a (`str` or `os.PathLike`): Folder or Hub id of the first.
        b (`str` or `os.PathLike`): Folder or Hub id of the second.

    Raises:
        ValueError: If one of them cannot be read.
    """
    with compared(a, b) as (first, second):
        common, others, changed = 0, set(), []
        for name in sorted(first.names & second.names):
            x, y = first[name], second[name]
            if x.shape != y.shape:
                others.add(name)
                continue
            common += 1
            difference = compare_tensors(name, x, y)
            if difference is not None:
                changed.append(difference)
        changed.sort(key=lambda d: (d.relative is not None, -(d.relative or 0)))
        return ModelDifference(
            common,
            changed,
            sorted(first.names - second.names | others),
            sorted(second.names - first.names | others),
        )


def compare_tensors(name: str, a: Tensor, b: Tensor) -> TensorDifference | None:
    """Compare two tensors of one shape; `None` if they are equal."""
    squares = norm = largest = 0.0
    differing = 0
    for x, y in zip(a.flatten().split(_CHUNK), b.flatten().split(_CHUNK), strict=True):
        x, y = x.double(), y.double()
        # NaN in the same place is no difference, nor is the same infinity
        delta = torch.where((x == y) | (x.isnan() & y.isnan()), 0.0, y - x)
        squares += float(delta.square().sum())
        norm += float(x.square().sum())
        # Python's `max` may overlook NaN
        largest = float(torch.cat([delta.new_tensor([largest]), delta.abs()]).max())
        differing += int((delta != 0).sum())
    if not differing:
        return None
    relative = (squares / norm) ** 0.5 if norm and math.isfinite(squares / norm) else None
    return TensorDifference(
        name, list(a.shape), relative, largest if math.isfinite(largest) else None, differing / a.numel()
    )


def difference_table(difference: ModelDifference) -> Table:
    """The tensors that differ, as people read them."""
    table = Table(
        title=f"{len(difference.changed)} of {difference.tensors} tensors differ", title_justify="left", expand=False
    )
    table.add_column("Tensor", overflow="fold")
    for name in ("Shape", "Relative L2", "Largest", "Entries changed"):
        table.add_column(name, justify="right")
    for d in difference.changed:
        if d.largest is None:
            relative, largest = "", "not finite"
        else:
            relative, largest = "from 0" if d.relative is None else f"{d.relative:.2e}", f"{d.largest:.2e}"
        # A stranger's names are no markup
        table.add_row(Text(d.name), "×".join(map(str, d.shape)), relative, largest, f"{d.share:.2%}")
    return table
