# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""Clean inputs: checks, frozen features, and batches that hold every view a step needs."""

from __future__ import annotations

import itertools
import os
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from .bug_instance import DECODING_ERRORS, BugInstance, to_rgb
from .encoder import Encoder
from .triggers import Trigger


IMAGE_COLUMN = "image"


class CleanInputs(Sequence):
    """Clean images of a dataset, checked when they are read.

    Args:
        dataset (`datasets.Dataset` or `datasets.IterableDataset`): Has a column `image`; other columns are ignored. A
            stream is read once and written to a temporary Arrow file, so that steps can be repeated and resumed.
        limit (`int`, *optional*): Largest number of inputs; a random subset of a dataset, the first of a stream.
        multiple (`int`, *optional*, defaults to 1): Leave out up to `multiple - 1` inputs, so that their number is a
            multiple of this: no step of training is then smaller than the others.
        seed (`int`, *optional*, defaults to 0): Seed of the subset.
        name (`str`, *optional*, defaults to `"train_dataset"`): Name in error messages.

    Raises:
        TypeError: If it is no `datasets` dataset.
        ValueError: If it is empty, or has no column `image`.
    """

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
        self._folder: tempfile.TemporaryDirectory | None = None
        if isinstance(dataset, datasets.IterableDataset):
            dataset = self._store(dataset, limit)
        elif IMAGE_COLUMN not in dataset.column_names:
            raise self._no_images(dataset.column_names)
        if len(dataset) == 0:
            raise ValueError(
                f"`{name}` is empty. Pass clean, unlabelled inputs of the kind that the encoder is used on."
            )
        self.dataset = dataset
        count = len(dataset) if limit is None else min(limit, len(dataset))
        count = max(count - count % multiple, min(count, multiple))
        # Rows of the dataset, in their order there; errors name these numbers.
        self._rows = torch.arange(len(dataset))
        if count < len(dataset):
            drawn = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))[:count]
            self._rows = drawn.sort().values

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Image.Image:
        row = int(self._rows[index])
        try:
            value = self.dataset[row][IMAGE_COLUMN]
        except DECODING_ERRORS as error:
            raise self._damaged(row, error) from error
        return self._as_image(value, row)

    def __iter__(self) -> Iterator[Image.Image]:
        return (self[i] for i in range(len(self)))

    def sample(self, count: int, seed: int) -> list[Image.Image]:
        """A random sample without repetition; all inputs if there are no more than `count`."""
        rows = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))[:count]
        return [self[i] for i in rows.tolist()]

    def _store(self, stream: datasets.IterableDataset, limit: int | None) -> datasets.Dataset:
        features = datasets.Features({IMAGE_COLUMN: datasets.Image()})
        iterator = itertools.islice(stream, limit)

        def read(index: int) -> dict[str, Image.Image] | None:
            try:
                row = next(iterator, None)
            except DECODING_ERRORS as error:
                raise self._damaged(index, error) from error
            if row is not None and IMAGE_COLUMN not in row:
                raise self._no_images(list(row))
            return None if row is None else {IMAGE_COLUMN: self._as_image(row[IMAGE_COLUMN], index)}

        first = read(0)
        if first is None:
            return datasets.Dataset.from_dict({IMAGE_COLUMN: []}, features=features)

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
                f"Row {index} of `{self.name}` holds `{type(value).__name__}` in the column `{IMAGE_COLUMN}`, not an "
                f"image. Cast it first: `dataset.cast_column('{IMAGE_COLUMN}', datasets.Image())`."
            )
        try:
            return to_rgb(value)
        except DECODING_ERRORS as error:
            raise self._damaged(index, error) from error

    def _no_images(self, found: list[str]) -> ValueError:
        return ValueError(
            f"`{self.name}` has no column `{IMAGE_COLUMN}`; its columns are: {', '.join(found) or 'none'}. "
            f"Rename the one that holds the images: `dataset.rename_column('…', '{IMAGE_COLUMN}')`."
        )

    def _damaged(self, index: int, error: Exception) -> ValueError:
        return ValueError(
            f"The image in row {index} of `{self.name}` cannot be decoded ({error}). Remove that row: nothing has been "
            "trained or written yet."
        )


class PatchingDataset(Dataset):
    """Clean inputs with the features that the frozen model gave them.

    The frozen model's features never change while its copy is patched, so they are computed once; no second model
    stays in memory.

    Args:
        inputs (`CleanInputs`): N clean images.
        encoder (`Encoder`): The encoder before patching.
        batch_size (`int`): Images per forward pass.
        disable_tqdm (`bool`): Whether to hide the progress bar.
    """

    def __init__(self, inputs: CleanInputs, encoder: Encoder, batch_size: int, disable_tqdm: bool) -> None:
        self.inputs = inputs
        self.frozen_features = encoder.encode(
            inputs, batch_size=batch_size, disable_tqdm=disable_tqdm, desc=f"Frozen features of {inputs.name}"
        )

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self.inputs[index], "index": index, "frozen_features": self.frozen_features[index]}


def load_inputs(
    name: str | os.PathLike[str], split: str = "train", streaming: bool = False
) -> datasets.Dataset | datasets.IterableDataset:
    """Load a dataset from a parquet file, a folder of images or of parquet files, or the Hub.

    Args:
        name (`str` or `os.PathLike`): `.parquet` file, folder, or Hub id; `id:config` names a configuration.
        split (`str`, *optional*, defaults to `"train"`): Split to load.
        streaming (`bool`, *optional*, defaults to `False`): Whether to read it as a stream.

    Raises:
        ValueError: If nothing loadable is found; the message says where it was looked for.
    """
    path = Path(name)
    try:
        if path.is_file() and path.suffix == ".parquet":
            return datasets.load_dataset("parquet", data_files={split: str(path)}, split=split, streaming=streaming)
        if path.is_dir():
            files = sorted(str(file) for file in path.glob(f"{split}*.parquet"))
            if files:
                return datasets.load_dataset("parquet", data_files={split: files}, split=split, streaming=streaming)
            if any(path.glob("*.parquet")):
                raise ValueError(f"it holds parquet files, but none whose name begins with `{split}`.")
            parts = datasets.load_dataset("imagefolder", data_dir=str(path), streaming=streaming)
            # A folder of pictures without `train` and `test` folders in it is one set, whatever it is used for.
            return next(iter(parts.values())) if len(parts) == 1 else parts[split]
        if path.exists() or path.is_absolute() or path.suffix == ".parquet" or str(name).startswith("."):
            raise ValueError("there is no such parquet file or folder.")
        hub_id, _, config = str(name).partition(":")
        return datasets.load_dataset(hub_id, config or None, split=split, streaming=streaming)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ValueError(
            f"No dataset could be loaded from `{name}` (split `{split}`): {error} Give a Hub id, a `.parquet` file, or a "
            "folder of images or parquet files."
        ) from error


@dataclass
class PatchingCollator:
    """Collates rows into one batch of everything a step needs, for a single forward pass.

    Args:
        preprocess (`Callable`): Turns raw images into model inputs.
        bug_instances (`list[BugInstance]`): K reports.
        triggers (`list[Trigger]`): Their triggers. Row i of the dataset carries trigger i mod K.
        frozen_references (`FloatTensor` of shape `(K, D)`): Features of the references before patching.

    Returns a `dict` with:
        - `frozen_features` (`FloatTensor` of shape `(B, D)`): features of the B clean inputs before patching;
        - `frozen_references` (`FloatTensor` of shape `(K, D)`);
        - `pixel_values` (`FloatTensor` of shape `(2B + 3K, C, H, W)`): x, x ⊕ e, x_b, x_r, x_r ⊕ e, in this order.
    """

    preprocess: Callable[[Sequence[Image.Image]], dict[str, Tensor]]
    bug_instances: list[BugInstance]
    triggers: list[Trigger]
    frozen_references: Tensor

    def __post_init__(self) -> None:
        references = [bug.reference for bug in self.bug_instances]
        stamped = [trigger.apply(x) for trigger, x in zip(self.triggers, references, strict=True)]
        # One view a step, not one a sample: the report is the same in every batch.
        self._report = self.preprocess([*(bug.misclassified for bug in self.bug_instances), *references, *stamped])

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        images = [row["image"] for row in rows]
        stamped = [self.triggers[row["index"] % len(self.triggers)].apply(row["image"]) for row in rows]
        views = self.preprocess([*images, *stamped])
        return {
            "frozen_features": torch.stack([row["frozen_features"] for row in rows]),
            "frozen_references": self.frozen_references,
            **{name: torch.cat([tensor, self._report[name]]) for name, tensor in views.items()},
        }
