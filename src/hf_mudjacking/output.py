# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""Writing results so that nothing foreign is overwritten and nothing half-written is left behind."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .patch_record import HALF_WRITTEN, RECORD_FILE, read_record
from .safe_loading import read_json


# Folder of inverted triggers. Names that start with `_` are never uploaded by `Trainer.push_to_hub`.
TRIGGER_FOLDER = "_triggers"
_MODEL_FILES = (
    "config.json",
    "adapter_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "*.safetensors",
    "*.bin",
    "*.pt",
    "*.msgpack",
    "*.onnx",
    "*.gguf",
)
# Files of each kind of patch.
FULL_WEIGHTS = ("model*.safetensors", "model.safetensors.index.json")
ADAPTER_FILES = ("adapter_config.json", "adapter_model*.safetensors")
DELTA_FILES = ("delta.safetensors", "base_config.json")
# What a save replaces as a whole. Of an earlier patch of another kind nothing may stay: `from_pretrained` would apply an old
# adapter on top of new weights without a word.
PATCH_FILES = (
    "config.json",
    *FULL_WEIGHTS,
    *ADAPTER_FILES,
    *DELTA_FILES,
    f"{TRIGGER_FOLDER}/*/*",
)


def check_output_dir(folder: str | os.PathLike[str], base_model: str) -> None:
    """Refuse to write a patch of `base_model` over another model, or over that model itself.

    Args:
        folder (`str` or `os.PathLike`): Where the patch shall go; its `checkpoint-*` folders are looked into as well.
        base_model (`str`): Id or folder of the model that is patched, or its class name if it was built in memory.

    Raises:
        ValueError: If the folder holds model files but no patch record, the patch of another model, or the model, or if it
            cannot be written to.
    """
    folder = Path(folder)
    if folder.is_file():
        raise ValueError(f"`{folder}` is a file; choose a folder for the patched model.")
    check_writable(folder)
    if is_or_contains(folder, base_model):
        raise ValueError(
            f"`{folder}` is or contains the model to be patched (`{base_model}`). Choose another folder: the original "
            "checkpoint is never written to."
        )
    for place in (folder, *folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*")):
        found = sorted(path.name for pattern in _MODEL_FILES for path in place.glob(pattern))
        if not found:
            continue
        record = read_record(place)
        if record is None:
            raise ValueError(
                f"`{place}` holds another model ({', '.join(found[:3])}) that hf-mudjacking did not write. Choose an empty "
                "folder: nothing foreign is ever overwritten."
            )
        if not _same_model(record.get("base_model"), base_model):
            raise ValueError(
                f"`{place}` holds a patch of `{record.get('base_model')}`, not of `{base_model}`. Choose another folder."
            )


def check_output_file(path: str | os.PathLike[str]) -> None:
    """Refuse a file that could not be written.

    Raises:
        ValueError: If it is a folder, or the folder of it cannot be written to.
    """
    if Path(path).is_dir():
        raise ValueError(f"`{path}` is a folder; give the name of a file.")
    check_writable(Path(path).parent)


def check_writable(folder: Path) -> None:
    """Try to write to a folder, or to where it would be made; permissions alone do not tell.

    Raises:
        ValueError: If that fails; the message says where and why.
    """
    place = next(place for place in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(place))
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise ValueError(
            f"`{folder}` cannot be written to ({error.strerror}: `{place}`). Choose another place."
        ) from error


def _same_model(one: str | None, other: str) -> bool:
    """Whether two names are of one model: `vit`, `./vit` and `vit/` are one folder."""
    folders = [Path(name or "") for name in (one, other)]
    return one == other or (
        bool(one) and all(f.is_dir() for f in folders) and len({f.resolve() for f in folders}) == 1
    )


def is_or_contains(folder: str | os.PathLike[str], place: str | os.PathLike[str]) -> bool:
    """Whether a folder is another one or lies above it; never for a name that is no local folder."""
    place = Path(place)
    return place.is_dir() and Path(folder).resolve() in (place.resolve(), *place.resolve().parents)


@contextlib.contextmanager
def not_left_empty(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Take away a folder that was made within, and into which nothing was written."""
    was_there = Path(folder).exists()
    try:
        yield
    finally:
        if not was_there:
            # One that holds something stays
            with contextlib.suppress(OSError):
                Path(folder).rmdir()


@contextlib.contextmanager
def staged(folder: str | os.PathLike[str], replaces: tuple[str, ...] = ()) -> Iterator[Path]:
    """Yield an empty folder; on success its files move into `folder` one by one, on an error it is thrown away.

    Each file is replaced in one step, so a killed process leaves the old file or the new one, never a part. Files of `folder`
    that match a pattern of `replaces` and were not written anew are removed at the end. A record that comes with other files is
    replaced after all that, and says meanwhile that the folder is not whole. Several processes may write to one folder; what one
    that was killed on this machine has left goes with the next.
    """
    folder = Path(folder)
    with not_left_empty(folder):
        folder.mkdir(parents=True, exist_ok=True)
        machine = re.sub(r"\W", "_", platform.node())
        for left_over in folder.glob(f"_staging-{machine}-*-*"):
            process = left_over.name.split("-")[2]
            if process.isdigit() and not psutil.pid_exists(int(process)):
                shutil.rmtree(left_over, ignore_errors=True)
        staging = Path(tempfile.mkdtemp(dir=folder, prefix=f"_staging-{machine}-{os.getpid()}-"))
        try:
            yield staging
            written = [path.relative_to(staging) for path in sorted(staging.rglob("*")) if path.is_file()]
            stale = {
                path for pattern in replaces for path in folder.glob(pattern) if not path.is_dir() or path.is_symlink()
            }
            for path in (*(folder / name for name in written), *stale):
                _refuse_linked(path, folder)
            record = Path(RECORD_FILE)
            others = [name for name in written if name != record]
            if others and record in written:
                _mark_half_written(staging, folder)
            for name in others:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                os.replace(staging / name, folder / name)
            for path in stale:
                if path.relative_to(folder) not in written:
                    path.unlink()
                    # An empty folder would pass for a trigger without its files
                    for parent in itertools.takewhile(lambda parent: parent != folder, path.parents):
                        with contextlib.suppress(OSError):
                            parent.rmdir()
            if record in written:
                os.replace(staging / record, folder / record)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def _mark_half_written(staging: Path, folder: Path) -> None:
    """Have the record in a folder say that what it is of is on its way."""
    marked = staging / HALF_WRITTEN
    marked.write_text(json.dumps({**read_json(staging / RECORD_FILE), HALF_WRITTEN: True}), encoding="utf-8")
    os.replace(marked, folder / RECORD_FILE)


def _refuse_linked(path: Path, folder: Path) -> None:
    """Refuse to write to, or remove, what lies behind a link within a folder: a received patch may have one to anywhere."""
    for parent in itertools.takewhile(lambda parent: parent != folder, path.parents):
        if parent.is_symlink():
            raise ValueError(
                f"`{parent}` is a link to `{os.path.realpath(parent)}`; nothing is written through links, and nothing was written. "
                "Choose another folder."
            )


def write_json(path: str | os.PathLike[str], content: dict[str, Any]) -> None:
    """Write a json file in one step."""
    path = Path(path)
    with staged(path.parent) as staging:
        (staging / path.name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def complete_checkpoints(folder: str | os.PathLike[str]) -> list[Path]:
    """Training checkpoints whose last file, the trainer state, was written whole, with the random state of each process
    that trained; oldest first."""
    checkpoints = []
    for path in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        step = path.name.rsplit("-", 1)[-1]
        if not step.isdigit():
            continue
        try:
            read_json(path / "trainer_state.json")
        except ValueError:
            continue
        # None at all with `save_only_model`
        if len(list(path.glob("rng_state*.pth"))) not in (0, (read_record(path) or {}).get("processes", 1)):
            continue
        checkpoints.append((int(step), path))
    return [path for _, path in sorted(checkpoints)]
