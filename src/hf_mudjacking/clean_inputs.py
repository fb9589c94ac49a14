# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""Clean, unlabelled inputs from datasets and streams, checked when they are read."""

from __future__ import annotations

import hashlib
import itertools
import logging
import tempfile
import uuid
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar

import datasets
import torch
from PIL import Image
from torch import Tensor

from .bug_instance import DECODING_ERRORS, to_rgb
from .preprocessing import Modality, RawInput
from .processes import done_by_all, gathered, place_on_node, rank_and_count


logger = logging.getLogger(__name__)

# Rows that are read twice to see whether a transform draws anew: a flip leaves every second as it is.
_READ_TWICE = 8


class CleanInputs(Sequence):
    """Clean inputs of a dataset; see [`CleanImages`] and [`CleanTexts`].

    Args:
        dataset (`datasets.Dataset` or `datasets.IterableDataset`): Has the column that the class names; others are
            ignored. A stream is read once and kept, so that steps can be repeated and resumed. With several processes,
            each makes the object, and all get the same inputs: a stream is read by one of them.
        limit (`int`, *optional*): Largest number of inputs; a random subset of a dataset, the first of a stream.
        multiple (`int`, *optional*, defaults to 1): Leave out up to `multiple - 1` inputs, so that their number is a
            multiple of this: no step of training is then smaller than the others.
        seed (`int`, *optional*, defaults to 0): Seed of the subset.
        name (`str`, *optional*, defaults to `"train_dataset"`): Name in error messages.

    Raises:
        TypeError: If it is no `datasets` dataset.
        ValueError: If it is empty, or lacks the column.
    """

    column: ClassVar[str]
    # Numbers of the rows that are used, in their order in the dataset, and how many rows that has
    _rows: Tensor
    _of: int

    def __init__(
        self,
        dataset: datasets.Dataset | datasets.IterableDataset,
        limit: int | None = None,
        seed: int = 0,
        name: str = "train_dataset",
        multiple: int = 1,
    ) -> None:
        if not isinstance(dataset, (datasets.Dataset, datasets.IterableDataset)):
            hint = " Did you mean to select a split, as in `dataset['train']`?" if isinstance(dataset, dict) else ""
            raise TypeError(
                f"`{name}` is of type `{type(dataset).__name__}`; a `datasets.Dataset` or `IterableDataset` is needed.{hint}"
            )
        self.name = name
        # Others would be decoded along; a transform may need them
        if self.column in (dataset.column_names or ()) and not has_transform(dataset):
            dataset = dataset.select_columns([self.column])
        self._read(dataset, limit, seed)
        if len(self) == 0:
            raise ValueError(
                f"`{name}` is empty. Pass clean, unlabelled inputs of the kind that the encoder is used on."
            )
        self._shorten(max(len(self) - len(self) % multiple, min(len(self), multiple)), seed)

    @abstractmethod
    def _read(self, dataset: datasets.Dataset | datasets.IterableDataset, limit: int | None, seed: int) -> None:
        """Take up to `limit` inputs of the dataset."""

    @abstractmethod
    def _shorten(self, count: int, seed: int) -> None:
        """Keep `count` inputs."""

    def _drawn(self, count: int, seed: int) -> Tensor:
        """Positions of `count` inputs at random: the first in an order of all rows of the dataset, whichever of them are used.

        So a part of a dataset and a larger one, drawn with the same seed, have samples in common.
        """
        order = torch.randperm(self._of, generator=torch.Generator().manual_seed(seed))
        return torch.searchsorted(self._rows, order[torch.isin(order, self._rows)][:count])

    @property
    def rows_in_all(self) -> int:
        """Rows of the dataset, whichever of them are used."""
        return self._of

    def __iter__(self) -> Iterator[RawInput]:
        return (self[i] for i in range(len(self)))

    def sample(self, count: int, seed: int) -> Sequence[RawInput]:
        """A random sample without repetition, read when it is used; all inputs if there are no more than `count`.

        Inputs that were drawn from a dataset with another limit, but the same seed, give the same sample, if they are as many.
        """
        return _Rows(self, self._drawn(count, seed).tolist())

    def _require_column(self, found: Iterable[str]) -> None:
        found = list(found)
        if self.column not in found:
            raise ValueError(
                f"`{self.name}` has no column `{self.column}`; its columns are: {', '.join(found) or 'none'}. "
                f"Rename the one that holds the {self.column}s: `dataset.rename_column('…', '{self.column}')`; on the command "
                "line name it (`--input-column`)."
            )


def has_transform(dataset: datasets.Dataset | datasets.IterableDataset) -> bool:
    """Whether the rows of a dataset go through a function of the user's (`with_transform`)."""
    return isinstance(dataset, datasets.Dataset) and dataset.format["type"] == "custom"


class _Rows(Sequence[RawInput]):
    """Some rows of clean inputs: a thousand decoded photographs would not fit into memory."""

    def __init__(self, inputs: Sequence[RawInput], rows: list[int]) -> None:
        self._inputs = inputs
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int | slice) -> Any:
        return _Rows(self._inputs, self._rows[index]) if isinstance(index, slice) else self._inputs[self._rows[index]]


class CleanImages(CleanInputs):
    """Clean images, read from a column `image` when they are used.

    A stream goes to a temporary Arrow file, written by one process of each machine and mapped by all. On several machines it
    must give each the same rows: streams that are shuffled need a seed, and none may be split by node.
    """

    column = "image"

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Image.Image:
        row = int(self._rows[index])
        try:
            content = self.dataset[row]
        except DECODING_ERRORS as error:
            raise self._damaged(row, error, self._path_of(row)) from error
        # A transform may have taken it away
        self._require_column(content)
        value = content[self.column]
        return self._as_image(value, row)

    def _read(self, dataset: datasets.Dataset | datasets.IterableDataset, limit: int | None, seed: int) -> None:
        self._folder: tempfile.TemporaryDirectory | None = None
        if isinstance(dataset, datasets.IterableDataset):
            dataset = self._stored_once(dataset, limit)
        else:
            self._require_column(dataset.column_names)
        self.dataset = dataset
        # Errors name these numbers
        self._rows, self._of = torch.arange(len(dataset)), len(dataset)
        self._shorten(len(dataset) if limit is None else min(limit, len(dataset)), seed)
        if has_transform(dataset):
            self._check_steady()

    def _shorten(self, count: int, seed: int) -> None:
        if count < len(self._rows):
            self._rows = self._rows[self._drawn(count, seed).sort().values]

    def _check_steady(self) -> None:
        """Refuse a transform that draws anew at each reading: frozen features would be those of other pictures."""
        if any(self[i].tobytes() != self[i].tobytes() for i in range(min(len(self), _READ_TWICE))):
            raise ValueError(
                f"`{self.name}` has a transform that gives another picture each time a row is read; features before and after would be "
                "of different pictures. Take it away (`dataset.with_format(None)`), or store its pictures once (`dataset.map`)."
            )

    def _stored_once(self, stream: datasets.IterableDataset, limit: int | None) -> datasets.Dataset:
        """The first `limit` rows of a stream in a file, which the first process of each machine writes."""
        number, _, first = place_on_node()
        read: list[datasets.Dataset] = []

        def files() -> list[str]:
            if number > 0:
                return []
            read.append(self._store(stream, limit))
            return [file["filename"] for file in read[0].cache_files]

        written = done_by_all(files)[first]
        parts = read or [datasets.Dataset.from_file(file) for file in written]
        stored = datasets.concatenate_datasets(parts) if parts else datasets.Dataset.from_dict({self.column: []})
        ends = [stored[i][self.column].tobytes() for i in (0, len(stored) - 1)] if len(stored) else []
        if len(set(gathered((len(stored), hashlib.sha256(b"".join(ends)).hexdigest())))) > 1:
            raise ValueError(
                f"`{self.name}` is a stream that gives other rows on another machine. Give its shuffling a seed, do not split it "
                "by node, or pass a `datasets.Dataset`."
            )
        return stored

    def _store(self, stream: datasets.IterableDataset, limit: int | None) -> datasets.Dataset:
        features = datasets.Features({self.column: datasets.Image()})
        iterator = itertools.islice(stream, limit)

        def read(index: int) -> dict[str, Image.Image] | None:
            try:
                row = next(iterator, None)
            except DECODING_ERRORS as error:
                raise self._damaged(index, error) from error
            if row is None:
                return None
            self._require_column(row)
            return {self.column: self._as_image(row[self.column], index)}

        first = read(0)
        if first is None:
            return datasets.Dataset.from_dict({self.column: []}, features=features)

        def rows() -> Iterator[dict[str, Image.Image]]:
            row, index = first, 0
            while row is not None:
                yield row
                index += 1
                row = read(index)

        self._folder = tempfile.TemporaryDirectory(prefix="hf_mudjacking_")
        try:
            return datasets.Dataset.from_generator(
                rows, features=features, cache_dir=self._folder.name, fingerprint=uuid.uuid4().hex
            )
        except datasets.exceptions.DatasetGenerationError as error:
            cause = error.__cause__
            raise (cause if isinstance(cause, ValueError) else error) from None

    def _as_image(self, value: Any, index: int) -> Image.Image:
        if not isinstance(value, Image.Image):
            raise ValueError(
                f"Row {index} of `{self.name}` holds `{type(value).__name__}` in the column `{self.column}`, not an "
                f"image. Cast it first: `dataset.cast_column('{self.column}', datasets.Image())`; if the dataset has a format of "
                "tensors, take that away: `dataset.with_format(None)`."
            )
        try:
            return to_rgb(value)
        except DECODING_ERRORS as error:
            raise self._damaged(index, error) from error

    def _path_of(self, row: int) -> str | None:
        """The file that a picture is from, where the dataset knows it."""
        if not isinstance(self.dataset.features.get(self.column), datasets.Image):
            return None
        encoded = self.dataset.with_format(None).cast_column(self.column, datasets.Image(decode=False))
        return encoded[row][self.column]["path"]

    def _damaged(self, index: int, error: Exception, path: str | None = None) -> ValueError:
        file = f", `{path}`," if path else ""
        return ValueError(
            f"The image in row {index} of `{self.name}`{file} cannot be decoded ({error}). Remove that row: nothing has been "
            "trained or written yet."
        )


class CleanTexts(CleanInputs):
    """Clean texts from a column `text`, in memory. Rows without text (`None`, only whitespace) are left out."""

    column = "text"

    def __len__(self) -> int:
        return len(self._texts)

    def __getitem__(self, index: int) -> str:
        return self._texts[index]

    def _read(self, dataset: datasets.Dataset | datasets.IterableDataset, limit: int | None, seed: int) -> None:
        if isinstance(dataset, datasets.Dataset):
            found = self._texts_of(dataset, limit, seed)
        else:
            # A stream need not give two processes the same rows
            reads = rank_and_count()[0] == 0
            found = done_by_all(lambda: self._texts_of(dataset, limit, seed) if reads else [])[0]
        self._texts = [text for _, text in found]
        self._rows = torch.tensor([row for row, _ in found], dtype=torch.long)
        self._of = (
            len(dataset) if isinstance(dataset, datasets.Dataset) else max((row for row, _ in found), default=-1) + 1
        )

    def _texts_of(
        self, dataset: datasets.Dataset | datasets.IterableDataset, limit: int | None, seed: int
    ) -> list[tuple[int, str]]:
        """Rows and their texts, in the order of the dataset."""
        if isinstance(dataset, datasets.Dataset):
            self._require_column(dataset.column_names)
            order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))
            rows = ((row, dataset[row]) for row in order.tolist())
        else:
            rows = enumerate(dataset)
        found: list[tuple[int, str]] = []
        empty = 0
        for row, content in rows:
            if limit is not None and len(found) == limit:
                break
            self._require_column(content)
            text = content[self.column]
            if text is not None and not isinstance(text, str):
                raise ValueError(
                    f"Row {row} of `{self.name}` holds `{type(text).__name__}` in the column `{self.column}`, not a text. "
                    "Pass raw texts: the tokenizer is applied here."
                )
            if text is None or not text.strip():
                empty += 1
                continue
            found.append((row, text))
        if empty:
            logger.warning(f"{empty} rows of `{self.name}` hold no text and are left out.")
        return sorted(found)

    def _shorten(self, count: int, seed: int) -> None:
        kept = self._drawn(count, seed).sort().values
        self._rows, self._texts = self._rows[kept], [self._texts[i] for i in kept.tolist()]


def clean_inputs(modality: Modality, *args: Any, **kwargs: Any) -> CleanInputs:
    """[`CleanImages`] or [`CleanTexts`]."""
    return {"image": CleanImages, "text": CleanTexts}[modality](*args, **kwargs)
