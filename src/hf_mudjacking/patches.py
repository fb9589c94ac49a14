# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""Applying a patch to the model it belongs to, taking it back, and making a delta of two models.

A patch is a folder with a record and full weights, a LoRA adapter, or a delta. No function here writes to a model, a patch
or a patched model: the result goes into a folder of its own, which says so if a killed process left it in parts.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from . import __version__
from .delta import DELTA_FILE, Delta, DeltaError, write_delta
from .fingerprint import weights_sha256
from .loading import load_with_missing, save_model
from .merging import MERGE_TOLERANCE
from .output import PATCH_FILES, TRIGGER_FOLDER, check_output_dir, check_writable, is_or_contains, staged, write_json
from .patch_record import RECORD_FILE, check_whole, load_record, read_record, versions
from .safe_loading import ADAPTER_CONFIG, ADAPTER_WEIGHTS, MODEL_CONFIG, WEIGHTS_INDEX, check_folder, inside, read_json
from .weight_files import WeightFiles, is_adapter, local_folder, saved_anew, with_adapter, with_the_same_names


# Configuration of the base, in the folder of a delta.
BASE_CONFIG = "base_config.json"
# What belongs to a model beside its weights: configurations, vocabularies, chat templates; folders of sentence-transformers.
_BESIDE = ("*.json", "*.txt", "*.model", "*.jinja", "[0-9]_*/*.json", "[0-9]_*/*.safetensors", f"{TRIGGER_FOLDER}/*/*")
_NOT_BESIDE = {RECORD_FILE, ADAPTER_CONFIG, WEIGHTS_INDEX, BASE_CONFIG, "report.json", "trainer_state.json"}


class WrongBaseError(ValueError):
    """A patch was to be applied to another model than the one it was made for, or to be taken back from one."""


def apply_patch(
    patch: str | os.PathLike[str],
    model: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    keep_adapter: bool = False,
) -> dict[str, Any]:
    """Make the patched model of a patch and the model that it belongs to.

    Args:
        patch (`str` or `os.PathLike`): Folder or Hub id of the patch: full weights, LoRA adapter, or delta.
        model (`str` or `os.PathLike`): Folder or Hub id of the unpatched model; its hash must be the one in the record.
        output_dir (`str` or `os.PathLike`): Folder for the patched model.
        keep_adapter (`bool`, *optional*, defaults to `False`): Whether a LoRA adapter stays one, on `model`, instead of
            being merged into a copy of it, in float32.

    Returns:
        `dict`: Record of the patched model.

    Raises:
        WrongBaseError: If the model is another one than the patch was made for; both hashes are in the message.
        ValueError: If patch, model or folder cannot be used, or merging would change features by more than 1e-5.
    """
    folder, record = _patch(patch)
    base = local_folder(model)
    _check_apart(output_dir, patch, model, folder, base)
    check_output_dir(output_dir, record["base_model"])
    kind = record["kind"]
    if keep_adapter and kind != "lora":
        raise ValueError(f"`{patch}` is of kind `{kind}`; only a LoRA patch can be kept as an adapter.")
    if kind == "lora" and not keep_adapter:
        _check_mergeable(record, patch)
    base_model = _checked_base(base, record, patch, model)
    record = {**record, "kind": kind if keep_adapter else "full"}
    # A report in a folder of ours is of the patch that was there
    reports = ("report.json",) if read_record(output_dir) is not None else ()
    with staged(output_dir, replaces=(*PATCH_FILES, *reports)) as staging:
        _copy_beside(folder, staging)
        if kind == "full":
            WeightFiles(folder).rewrite(staging, lambda _, tensor: tensor, {})
        elif kind == "delta":
            del base_model
            delta = Delta(folder)
            with _named_for(delta, base) as weights:
                delta.apply(weights, staging)
        elif keep_adapter:
            with_adapter(base_model, folder)
            shutil.copyfile(inside(folder, ADAPTER_WEIGHTS), staging / ADAPTER_WEIGHTS)
            config = {**read_json(inside(folder, ADAPTER_CONFIG)), "base_model_name_or_path": _absolute(model)}
            write_json(staging / ADAPTER_CONFIG, config)
        else:
            save_model(with_adapter(base_model, folder).merge_and_unload(safe_merge=True), staging)
        write_json(staging / RECORD_FILE, record)
    return record


def revert_patch(
    patched: str | os.PathLike[str],
    patch: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    base_model: str | os.PathLike[str] | None = None,
) -> None:
    """Make the unpatched model again, to the last bit.

    A delta is taken back from the patched model; a model patched with full weights or an adapter does not hold its base any
    more, which is fetched from where the record says it is. Either way its hash must be the one in the record.

    Args:
        patched (`str` or `os.PathLike`): Folder or Hub id of the patched model.
        patch (`str` or `os.PathLike`): Folder or Hub id of the patch.
        output_dir (`str` or `os.PathLike`): Empty or new folder for the model.
        base_model (`str` or `os.PathLike`, *optional*): Where the base is now, if that is not where the record says; not
            needed for a delta.

    Raises:
        WrongBaseError: If what comes out is not the model that the patch was made for.
        ValueError: If patched model, patch or folder cannot be used.
    """
    folder, record = _patch(patch)
    changed = check_folder(local_folder(patched))
    name = record["base_model"] if base_model is None else base_model
    if not name and record["kind"] != "delta":
        raise ValueError(f"The record of `{patch}` does not say where its base is. Say it (`--base-model`).")
    _check_apart(output_dir, patched, patch, name)
    if Path(output_dir).exists() and any(Path(output_dir).iterdir()):
        raise ValueError(f"`{output_dir}` is not empty. Choose a new folder for the unpatched model.")
    check_writable(Path(output_dir))
    if record["kind"] == "delta":
        delta = Delta(folder)
        with staged(output_dir) as staging, _named_for(delta, changed, back=True) as weights:
            _copy_beside(folder, staging)
            shutil.rmtree(staging / TRIGGER_FOLDER, ignore_errors=True)
            shutil.copyfile(inside(folder, BASE_CONFIG), staging / MODEL_CONFIG)
            delta.apply(weights, staging, back=True)
            _checked_base(staging, record, patch, f"{patched} without the patch")
        return
    theirs = load_record(changed)
    if theirs["base_weights_sha256"] != record["base_weights_sha256"]:
        raise WrongBaseError(
            f"`{patched}` was not made with `{patch}`: by their records the one is a patch of a model with the sha256 "
            f"{theirs['base_weights_sha256']}, the other of one with {record['base_weights_sha256']}."
        )
    try:
        base = local_folder(name, record["base_revision"] if base_model is None else None)
    except ValueError as error:
        raise ValueError(f"{error} If the base was moved, say where it is (`--base-model`).") from error
    _checked_base(base, record, patch, name)
    with staged(output_dir) as staging:
        _copy_beside(base, staging)
        WeightFiles(base).rewrite(staging, lambda _, tensor: tensor, {})
        if is_adapter(base):
            shutil.copyfile(base / ADAPTER_CONFIG, staging / ADAPTER_CONFIG)


def save_delta(
    base: str | os.PathLike[str], patched: str | os.PathLike[str], output_dir: str | os.PathLike[str]
) -> dict[str, Any]:
    """Write the difference between a model and its patched form as a patch that can be applied and taken back exactly.

    Args:
        base (`str` or `os.PathLike`): Folder or Hub id of the unpatched model.
        patched (`str` or `os.PathLike`): Folder or Hub id of the patched model, or of a LoRA patch, which is merged first.
            If its record says that it is a patch of this very base, that record is carried on.
        output_dir (`str` or `os.PathLike`): Folder for the delta.

    Returns:
        `dict`: Record of the delta.

    Raises:
        DeltaError: If both are the same, or no delta leads from one to the other.
        WrongBaseError: If `patched` is a LoRA patch of another model.
        ValueError: If a model or the folder cannot be used.
    """
    base_folder, patched_folder = local_folder(base), local_folder(patched)
    if is_adapter(base_folder):
        raise ValueError(f"`{base}` is an adapter; a delta leads from a model to another. Give the model first.")
    _check_apart(output_dir, base, patched, base_folder, patched_folder)
    model, missing = load_with_missing(base_folder)
    record = read_record(patched_folder) or {}
    if is_adapter(patched_folder):
        _check_mergeable(record, patched)
    found = _sha256(model, missing, record) if record else None
    ours = bool(record) and record["base_weights_sha256"] == found
    if is_adapter(patched_folder) and record.get("base_weights_sha256") and not ours:
        raise _wrong_base(base, patched, found, record)
    if not ours:
        record = {
            "hf_mudjacking": __version__,
            "base_model": str(base),
            "base_revision": None if os.path.isdir(base) else _revision_of(base_folder),
            "base_weights_sha256": _sha256(model, missing, {"base_weights_without": []}),
            "base_weights_without": sorted(missing),
            "figures": {},
            "versions": versions(),
        }
    del model
    record["kind"] = "delta"
    check_output_dir(output_dir, record["base_model"])
    with staged(output_dir, replaces=PATCH_FILES) as staging:
        with _merged(patched_folder, base_folder) as merged:
            with with_the_same_names(base_folder, merged) as (a, b):
                write_delta(staging / DELTA_FILE, a, b)
                shutil.copyfile(a.folder / MODEL_CONFIG, staging / BASE_CONFIG)
                _copy_beside(patched_folder, staging, triggers=ours)
                shutil.copyfile(b.folder / MODEL_CONFIG, staging / MODEL_CONFIG)
        write_json(staging / RECORD_FILE, record)
    return record


@contextmanager
def compared(a: str | os.PathLike[str], b: str | os.PathLike[str]) -> Iterator[tuple[WeightFiles, WeightFiles]]:
    """Weights of two models, or two adapters, by the same names; an adapter and a model: merged, on that model.

    Raises:
        ValueError: If there are none.
    """
    folders = [check_folder(local_folder(name)) for name in (a, b)]
    for name, folder in zip((a, b), folders, strict=True):
        if (read_record(folder) or {}).get("kind") == "delta":
            raise ValueError(f"`{name}` is a delta, no model; `mudjack apply` makes one of it.")
    adapters = [is_adapter(folder) for folder in folders]
    if all(adapters):
        yield WeightFiles(folders[0]), WeightFiles(folders[1])
        return
    with _merged(folders[0], folders[1]) as first, _merged(folders[1], folders[0]) as second:
        with with_the_same_names(first, second) as files:
            yield files[0], files[1]


# ---- Small helpers ----


def _patch(patch: str | os.PathLike[str]) -> tuple[Path, dict[str, Any]]:
    """Folder and record of a patch that can be used."""
    folder = check_folder(local_folder(patch))
    record = load_record(folder)
    check_whole(patch, record)
    if record["kind"] not in ("full", "lora", "delta"):
        raise ValueError(
            f"`{patch}` is a patch of kind `{record['kind']}`, which this version does not know. Update it."
        )
    if record["base_weights_sha256"] is None:
        raise ValueError(
            f"The record of `{patch}` has no `base_weights_sha256`, so nothing says which weights it belongs to."
        )
    return folder, record


def _absolute(model: str | os.PathLike[str]) -> str:
    """A Hub id as it is; of a folder the whole path, which is right wherever it is read."""
    return os.path.abspath(model) if os.path.isdir(model) else str(model)


def _check_mergeable(record: dict[str, Any], patch: object) -> None:
    error = record.get("merge_error")
    if error is not None and not error <= MERGE_TOLERANCE:
        raise ValueError(
            f"Merging `{patch}` would change features by up to {error:.2g}, by its record; {MERGE_TOLERANCE:g} is allowed. "
            "Keep it as an adapter (`mudjack apply --keep-adapter`)."
        )


def _check_apart(output_dir: str | os.PathLike[str], *sources: str | os.PathLike[str]) -> None:
    for source in sources:
        if is_or_contains(output_dir, source):
            raise ValueError(
                f"`{output_dir}` is or contains `{source}`, which is never written to. Choose another folder."
            )


def _checked_base(base: Path, record: dict[str, Any], patch: object, name: object) -> Any:
    """The model in a folder, in float32, if it is the base of a patch."""
    model, missing = load_with_missing(base)
    found = _sha256(model, missing, record)
    if found != record["base_weights_sha256"]:
        raise _wrong_base(name, patch, found, record)
    return model


def _wrong_base(name: object, patch: object, found: str | None, record: dict[str, Any]) -> WrongBaseError:
    return WrongBaseError(
        f"`{name}` is not the model that `{patch}` belongs to. Its weights have the sha256 {found}; the patch was made "
        f"for {record['base_weights_sha256']} (`{record['base_model']}`, revision {record['base_revision']}). Nothing "
        "was written."
    )


def _sha256(model: Any, missing: set[str], record: dict[str, Any]) -> str:
    return weights_sha256(model, missing.union(record["base_weights_without"]))


@contextmanager
def _named_for(delta: Delta, folder: Path, back: bool = False) -> Iterator[WeightFiles]:
    """Weights of a model by the names that a delta has for them."""
    weights = WeightFiles(folder)
    if delta.fits(weights, back):
        yield weights
        return
    with saved_anew(folder) as place:
        weights = WeightFiles(place)
        if not delta.fits(weights, back):
            raise DeltaError(f"`{folder}` lacks tensors that `{delta.path}` changes, so they do not belong together.")
        yield weights


@contextmanager
def _merged(folder: Path, base: Path) -> Iterator[Path]:
    """A model as it is; an adapter merged into its base, in a temporary folder."""
    if not is_adapter(folder):
        yield folder
        return
    with saved_anew(base) as place:
        merged = with_adapter(load_with_missing(place)[0], folder).merge_and_unload(safe_merge=True)
        save_model(merged, place)
        yield place


def _revision_of(folder: Path) -> str | None:
    """Commit of a snapshot in the Hub's cache."""
    return folder.name if folder.parent.name == "snapshots" else None


def _copy_beside(folder: Path, target: Path, triggers: bool = True) -> None:
    """Copy what belongs to a model beside its weights."""
    names = {str(path.relative_to(folder)) for pattern in _BESIDE for path in folder.glob(pattern) if path.is_file()}
    for name in sorted(names - _NOT_BESIDE):
        if triggers or not name.startswith(TRIGGER_FOLDER):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(inside(folder, name), target / name)
