# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""Labelled inputs and downstream tasks."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, IterableDataset
from PIL import Image

from ..bug_instance import DECODING_ERRORS, to_rgb
from ..clean_inputs import has_transform
from ..preprocessing import Modality, RawInput


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LabelledInputs:
    """Raw inputs with their labels.

    Args:
        inputs (`Sequence[PIL.Image.Image]` or `Sequence[str]`): N raw inputs.
        labels (`np.ndarray` of shape `(N,)`): Integer class of each.

    Raises:
        ValueError: If the lengths differ or there are fewer than two classes.
    """

    inputs: Sequence[RawInput]
    labels: np.ndarray

    def __post_init__(self) -> None:
        object.__setattr__(self, "labels", np.asarray(self.labels))
        if len(self.inputs) != len(self.labels):
            raise ValueError(f"There are {len(self.inputs)} inputs and {len(self.labels)} labels; they must pair up.")
        if self.labels.ndim != 1:
            raise ValueError(
                f"Labels have the shape {self.labels.shape}; one integer for each input is needed. Name the column that holds the "
                "classes: `label_column` (`mudjack`: `--label-column`)."
            )
        if not np.issubdtype(self.labels.dtype, np.integer):
            raise ValueError(
                f"Labels must be integers, not {self.labels.dtype} (the first is {self.labels[:1].tolist()}). Turn them into "
                "classes first: `dataset.class_encode_column('label')`."
            )
        if len(np.unique(self.labels)) < 2:
            raise ValueError(f"A classifier needs at least two classes; these {len(self.labels)} inputs have fewer.")

    @classmethod
    def from_dataset(
        cls, dataset: Dataset, input_column: str | None = None, label_column: str = "label"
    ) -> LabelledInputs:
        """Read two columns of a `datasets.Dataset` into memory.

        Args:
            dataset (`datasets.Dataset`): Labelled images or texts.
            input_column (`str`, *optional*): Column of the inputs; `image` or `text`, whichever is there, when absent.
            label_column (`str`, *optional*, defaults to `"label"`): Column of the classes.

        Raises:
            TypeError: If it is a stream, several splits or no dataset.
            ValueError: If a column is missing, or a row holds no label, no input or one that cannot be decoded.
        """
        if not isinstance(dataset, Dataset):
            hint = {
                DatasetDict: " Select a split: `dataset['train']`.",
                IterableDataset: " Read it into one: `Dataset.from_list(list(stream.take(1000)), features=stream.features)`.",
            }.get(type(dataset), "")
            raise TypeError(
                f"A labelled set is of type `{type(dataset).__name__}`; a `datasets.Dataset` is needed.{hint}"
            )
        if input_column is None:
            input_column = next((name for name in ("image", "text") if name in dataset.column_names), "image")
        missing = {input_column, label_column} - set(dataset.column_names)
        if missing:
            raise ValueError(
                f"A labelled set needs the columns `{input_column}` and `{label_column}`; missing: {sorted(missing)}, "
                f"found: {dataset.column_names}. Name its own: `input_column`, `label_column` (`mudjack`: `--input-column`, "
                "`--labelled-input-column`, `--label-column`)."
            )
        if not has_transform(dataset):
            # A format would give arrays, or leave columns out
            dataset = dataset.with_format(None)
        # Alone: other columns, pictures perhaps, need not be decoded
        column, inputs = dataset.select_columns(input_column), []
        for row in range(len(column)):
            try:
                value = column[row][input_column]
                value = to_rgb(value) if isinstance(value, Image.Image) else value
            except DECODING_ERRORS as error:
                raise ValueError(
                    f"The image in row {row} of the labelled set cannot be decoded ({error}). Remove that row."
                ) from error
            if not isinstance(value, (Image.Image, str)) or (isinstance(value, str) and not value.strip()):
                raise ValueError(
                    f"Row {row} of the labelled set holds {value!r:.40} in the column `{input_column}`, neither an image nor a "
                    "text. Remove such rows with `dataset.filter`."
                )
            inputs.append(value)
        values = list(dataset[label_column])
        if None in values:
            raise ValueError(
                f"{values.count(None)} rows of the labelled set have no label in the column `{label_column}` (the first is row "
                f"{values.index(None)}). Remove such rows with `dataset.filter`."
            )
        labels = np.asarray(values)
        classes = set(labels.tolist()) if labels.dtype.kind == "i" else set()
        named = isinstance(dataset.features.get(label_column), ClassLabel)
        # Two classes may well be called -1 and 1
        if min(classes, default=0) < 0 and (named or (min(classes) == -1 and len(classes) > 2)):
            raise ValueError(
                f"{int((labels < 0).sum())} rows of the labelled set have a negative number in the column `{label_column}`, as rows "
                "without a label have. Remove such rows with `dataset.filter`."
            )
        return cls(inputs, labels)

    def select(self, indices: Sequence[int] | np.ndarray) -> LabelledInputs:
        """The rows at `indices`, in that order."""
        return LabelledInputs([self.inputs[i] for i in indices], self.labels[np.asarray(indices)])

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class DownstreamTask:
    """What a client of the encoder does: train a classifier on features, use it on new inputs.

    Args:
        train (`LabelledInputs`): The classifier's training set.
        test (`LabelledInputs`): Inputs that every rate is measured on.
        name (`str`, *optional*, defaults to `"task"`): Name in reports.
        class_names (`list[str]`, *optional*): Names of the classes.
    """

    train: LabelledInputs
    test: LabelledInputs
    name: str = "task"
    class_names: list[str] = field(default_factory=list)

    @property
    def modality(self) -> Modality:
        """`"image"` or `"text"`: what its inputs are."""
        return "text" if isinstance(self.test.inputs[0], str) else "image"

    @classmethod
    def from_datasets(cls, train: Dataset, test: Dataset, name: str = "task", **columns: Any) -> DownstreamTask:
        """Build a task from two labelled datasets.

        Args:
            train (`datasets.Dataset`): The classifier's training set.
            test (`datasets.Dataset`): Its test set, with the same columns.
            name (`str`, *optional*, defaults to `"task"`): Name in reports.
            columns: `input_column` and `label_column`; see [`LabelledInputs.from_dataset`].

        Where both sets name their classes, these are paired by name: folders of pictures number those that are there.

        Raises:
            TypeError: If one of them is a stream, several splits or no dataset.
            ValueError: If a set is empty, a column is missing, a row holds no input, or the test set names a class that the
                training set lacks.
        """
        label_column = columns.get("label_column", "label")
        parts = [LabelledInputs.from_dataset(part, **columns) for part in (train, test)]
        label, test_label = (part.features.get(label_column) for part in (train, test))
        names = label.names if isinstance(label, ClassLabel) else []
        if names and isinstance(test_label, ClassLabel) and test_label.names != names:
            unknown = sorted(set(test_label.names) - set(names))
            if unknown:
                raise ValueError(
                    f"The test set of `{name}` has classes that its training set lacks: {', '.join(unknown)}. The training set "
                    f"has: {', '.join(names)}."
                )
            numbers = np.array([names.index(each) for each in test_label.names])
            parts[1] = LabelledInputs(parts[1].inputs, numbers[parts[1].labels])
        unseen = sorted(set(parts[1].labels.tolist()) - set(parts[0].labels.tolist()))
        if unseen:
            rows = int(np.isin(parts[1].labels, unseen).sum())
            logger.warning(
                f"{rows} of {len(parts[1])} test rows of `{name}` are of classes of which its training set has none "
                f"({', '.join(map(str, unseen))}): no classifier gets them right, and all accuracies are lower by that."
            )
        return cls(*parts, name, names)
