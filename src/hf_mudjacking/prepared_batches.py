# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""From many raw inputs to batches of what a model takes, in this process or in workers; needs no model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeAlias

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .preprocessing import ImagePreprocessor, RawInput, TextPreprocessor


# Texts are sorted by length within this many batches, so that little is spent on padding.
_SORTED_BATCHES = 16

# How many raw inputs, and batches of them: their numbers among these, and the model's inputs
Group: TypeAlias = "tuple[int, Iterable[tuple[Sequence[int], dict[str, Tensor]]]]"


def prepared(
    inputs: Iterable[RawInput],
    preprocessor: ImagePreprocessor | TextPreprocessor,
    model_name: str,
    batch_size: int,
    rank: int,
    count: int,
) -> Iterator[Group]:
    """Groups of raw inputs, and of each the batches that are the business of one process. Texts of like length share a batch.

    Args:
        inputs (`Iterable[PIL.Image.Image]` or `Iterable[str]`): N raw inputs; read lazily.
        preprocessor (`ImagePreprocessor` or `TextPreprocessor`): Makes model inputs of them.
        model_name (`str`): For messages.
        batch_size (`int`): Raw inputs a batch.
        rank, count (`int`): Number of the process, and how many there are: every `count`-th input from `rank` on is its own.

    Raises:
        TypeError: If an input is not what the preprocessor takes.
    """
    texts = isinstance(preprocessor, TextPreprocessor)
    first = 0
    for group in _batched(inputs, count * batch_size * (_SORTED_BATCHES if texts else 1)):
        _check_kind(group, first, texts, model_name)
        own = range(rank, len(group), count)
        order = sorted(own, key=lambda i: len(group[i])) if texts else list(own)
        batches = (order[i : i + batch_size] for i in range(0, len(order), batch_size))
        yield len(group), ((rows, preprocessor([group[i] for i in rows])) for rows in batches)
        first += len(group)


def prepared_ahead(
    images: Sequence[Image.Image],
    preprocessor: ImagePreprocessor,
    model_name: str,
    batch_size: int,
    num_workers: int,
) -> Iterator[Group]:
    """As [`prepared`], of all images, by `num_workers` other processes; a batch is a group."""
    batches = _PreparedBatches(images, batch_size, preprocessor, model_name)
    # A generator of its own: workers get seeds, which would be drawn from the global one
    loader = DataLoader(batches, batch_size=None, num_workers=num_workers, generator=torch.Generator())
    for model_inputs in loader:
        if isinstance(model_inputs, Exception):
            raise model_inputs
        size = len(model_inputs["pixel_values"])
        yield size, [(range(size), model_inputs)]


class _PreparedBatches(Dataset):
    """Images a batch at a time, prepared where they are asked for: in a worker, which needs no model.

    An item is what the model takes, or the error that came instead, whose message would be buried in a traceback if it were
    raised in a worker.
    """

    def __init__(
        self, images: Sequence[Image.Image], batch_size: int, preprocessor: ImagePreprocessor, model_name: str
    ) -> None:
        self.images, self.batch_size, self.preprocessor, self.model_name = images, batch_size, preprocessor, model_name

    def __len__(self) -> int:
        return math.ceil(len(self.images) / self.batch_size)

    def __getitem__(self, number: int) -> dict[str, Tensor] | Exception:
        first = number * self.batch_size
        try:
            images = [self.images[i] for i in range(first, min(first + self.batch_size, len(self.images)))]
            _check_kind(images, first, False, self.model_name)
            return self.preprocessor(images)
        except Exception as error:
            return error


def _batched(items: Iterable[Any], size: int) -> Iterable[list[Any]]:
    batch: list[Any] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _check_kind(inputs: Sequence[RawInput], first: int, texts: bool, model_name: str) -> None:
    """Refuse what is no raw input of the model; `first` is the number of the first one."""
    needed = str if texts else Image.Image
    for number, x in enumerate(inputs, first):
        if not isinstance(x, needed):
            raise TypeError(
                f"Input {number} is of type `{type(x).__name__}`; `{model_name}` takes "
                f"{'texts (`str`)' if texts else 'images (`PIL.Image.Image`)'}."
            )
