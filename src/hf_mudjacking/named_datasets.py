# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""Datasets by name: files, folders, and ids on the Hub."""

from __future__ import annotations

import glob
import os
from pathlib import Path

import datasets
from PIL import Image


# What folders of the same split are called.
_SPLIT_NAMES = (
    ("train", "training"),
    ("validation", "valid", "val", "dev"),
    ("test", "testing", "eval", "evaluation"),
)


def load_inputs(
    name: str | os.PathLike[str], split: str = "train", streaming: bool = False
) -> datasets.Dataset | datasets.IterableDataset:
    """Load a dataset from a parquet file, a text file, a folder of images, texts or parquet files, or the Hub.

    Args:
        name (`str` or `os.PathLike`): `.parquet` file, `.txt` file (a text a line), folder, or Hub id; `id:config` names
            a configuration. Of a folder of images that has a folder for each split (`train`, `test`, ...), the one of this
            split is read; one without is one set whatever it is used for.
        split (`str`, *optional*, defaults to `"train"`): Split to load.
        streaming (`bool`, *optional*, defaults to `False`): Whether to read it as a stream.

    Raises:
        ValueError: If nothing loadable is found; the message says where it was looked for.
    """
    path = Path(name)
    try:
        if path.is_file() and path.suffix == ".parquet":
            return datasets.load_dataset("parquet", data_files={split: str(path)}, split=split, streaming=streaming)
        if path.is_file() and path.suffix == ".txt":
            return datasets.load_dataset("text", data_files={split: str(path)}, split=split, streaming=streaming)
        if path.is_dir():
            files = sorted(str(file) for file in path.glob(f"{split}*.parquet"))
            if files:
                return datasets.load_dataset("parquet", data_files={split: files}, split=split, streaming=streaming)
            if any(path.glob("*.parquet")):
                raise ValueError(f"it holds parquet files, but none whose name begins with `{split}`.")
            texts = sorted(str(file) for file in path.glob("*.txt"))
            # Notes beside pictures make no set of texts
            if texts and not _pictures_in(path):
                return datasets.load_dataset("text", data_files={split: texts}, split=split, streaming=streaming)
            # Left to itself the loader guesses splits from any part of a path, be it the name of a class or of a picture
            pattern = f"{glob.escape(str(_split_folder(path, split)))}/**"
            return datasets.load_dataset(
                "imagefolder", data_files={"train": pattern}, split="train", streaming=streaming
            )
        if path.exists():
            raise ValueError(f"files of the kind `{path.suffix}` are not read.")
        if path.is_absolute() or path.suffix in (".parquet", ".txt") or str(name).startswith("."):
            raise ValueError("there is no such file or folder.")
        hub_id, _, config = str(name).partition(":")
        return datasets.load_dataset(hub_id, config or None, split=split, streaming=streaming)
    except PermissionError as error:
        raise ValueError(
            f"`{name}` could not be loaded: `{error.filename}` may not be read or written ({error.strerror}). If that is the "
            "cache, set `HF_HOME` to a folder of yours."
        ) from error
    except (OSError, ValueError, RuntimeError, KeyError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(
            f"No dataset could be loaded from `{name}` (split `{split}`): {error} Give a Hub id, a `.parquet` or "
            "`.txt` file, or a folder of images, texts or parquet files."
        ) from error


def load_labelled(
    train: str | os.PathLike[str], test: str | os.PathLike[str] | None = None, test_split: str = "test"
) -> tuple[datasets.Dataset, datasets.Dataset]:
    """The two labelled sets of a task, which must not be one.

    Args:
        train (`str` or `os.PathLike`): Where the training set is; see [`load_inputs`].
        test (`str` or `os.PathLike`, *optional*): Where the test set is; the same place, which then has two splits, when absent.
        test_split (`str`, *optional*, defaults to `"test"`): Its split.

    Raises:
        ValueError: If one cannot be loaded, or one set would serve as both.
    """
    one_place = test is None or os.path.realpath(test) == os.path.realpath(train)
    train_set, test_set = (
        load_inputs(place, split) for place, split in ((train, "train"), (train if test is None else test, test_split))
    )
    # A file is one set by whatever split it is asked for; of a folder without splits both are read from the same file
    if one_place and (Path(train).is_file() or train_set.cache_files == test_set.cache_files):
        raise ValueError(
            f"`{train}` is one set, and classifiers must not be tested on what they were trained on. Give two, or one with a "
            f"split `train` and a split `{test_split}` (folders of those names, or `train*.parquet` and `{test_split}*.parquet`)."
        )
    return train_set, test_set


def _split_folder(path: Path, split: str) -> Path:
    """The folder of a split; the folder itself, where it has none and is one set whatever it is used for.

    A folder called as a split is may also be a class: `train` beside `bus` and `car` is one, beside `test` it is not.

    Raises:
        ValueError: If there are splits, and none is the one that is wanted.
    """
    names = next((names for names in _SPLIT_NAMES if split in names), (split,))
    folders = sorted(child for child in path.iterdir() if child.is_dir() and _pictures_in(child))
    splits = [child for child in folders if any(child.name in each for each in (*_SPLIT_NAMES, names))]
    if not splits or len(splits) < min(len(folders), 2):
        return path
    wanted = [child for child in splits if child.name in names]
    if not wanted:
        raise ValueError(f"it has no split of that name; there are {', '.join(child.name for child in splits)}.")
    return wanted[0]


def _pictures_in(folder: Path) -> bool:
    """Whether any file in a folder, or below, is a picture by its name."""
    known = Image.registered_extensions()
    return any(path.suffix.lower() in known for path in folder.rglob("*"))
