# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""The record of a patch: of which model it is, what it repairs, how it was made, and what was measured."""

from __future__ import annotations

import dataclasses
import os
import platform
from enum import Enum
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.utils import is_peft_model

from . import __version__
from .fingerprint import report_sha256
from .safe_loading import ADAPTER_CONFIG, inside, read_json


if TYPE_CHECKING:
    from .config import MudjackingConfig
    from .trainer import MudjackingTrainer


# Says that a folder holds a patch of ours, and of which model.
RECORD_FILE = "mudjacking.json"
# What the record of a folder has while its files are being replaced: the folder is ours, and not whole.
HALF_WRITTEN = "half_written"
_LIBRARIES = ("torch", "transformers", "peft", "accelerate")
_SETTINGS = (
    "seed",
    "data_seed",
    "max_steps",
    "num_train_epochs",
    "max_inputs",
    "learning_rate",
    "token_learning_rate",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "optim",
    "optim_args",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "train_sampling_strategy",
    "bf16",
    "fp16",
    "locality_weight",
    "generalizability_weight",
    "reference_weight",
    "altered_triggers",
    "reinversions",
    "adversarial_levels",
    "latent_strength",
    "patch_scope",
    "locality_budget",
)
_OPTIONAL_NAMES = ("base_revision", "modality", "base_weights_sha256", "clean_inputs_sha256")
# What a record of an earlier version may lack.
_DEFAULTS: dict[str, Any] = {
    "base_model": "",
    "base_revision": None,
    "base_weights_sha256": None,
    "base_weights_without": [],
    "bug_ids": [],
    "clean_inputs_sha256": None,
    "modality": None,
    "triggers": [],
    "trigger_groups": [],
    "evidence": [],
    "screenings": [],
    "skipped": [],
    "remembered": [],
    "settings": {},
    "versions": {},
    "figures": None,
    "merge_error": None,
}


def describe_patch(trainer: MudjackingTrainer) -> dict[str, Any]:
    """The record of what a trainer has made so far; nothing of the reported inputs but their hashes.

    Returns:
        `dict`: Writable as json. `kind` (`"full"` or `"lora"`), `base_model`, `base_revision`, `base_weights_sha256` with
        `base_weights_without`, `bug_ids` ([`~hf_mudjacking.fingerprint.report_sha256`]), `triggers` (their summaries),
        `modality` (`"image"` or `"text"`), `unfinished` (whether the locality budget has yet to be checked), `settings`, `versions`,
        `figures` (by task: `before`, `after`, where they are known `clean`, and with which trigger and classifiers; empty unless the
        repair was measured) and what the pre-step and the checks found.
    """
    return {
        "hf_mudjacking": __version__,
        "kind": "lora" if is_peft_model(trainer.encoder.model) else "full",
        "base_model": trainer.base_model_name,
        "base_revision": trainer.base_revision,
        "base_weights_sha256": trainer.base_weights_sha256,
        "base_weights_without": trainer.base_weights_without,
        "bug_ids": [report_sha256(bug) for bug in trainer.bug_instances],
        "clean_inputs_sha256": trainer.clean_inputs_sha256,
        "modality": trainer.encoder.modality,
        "feature_source": trainer.encoder.feature_source,
        "triggers": [None if trigger is None else trigger.summary() for trigger in trainer.triggers or []],
        "evidence": trainer.evidence,
        "screenings": [screening.record() for screening in trainer.screenings] or trainer.earlier_screenings,
        "trigger_groups": trainer.trigger_groups,
        "skipped": trainer.skipped,
        "remembered": [earlier.record() for earlier in trainer.remembered],
        "locality": None if trainer.locality is None else dataclasses.asdict(trainer.locality),
        "settings": recorded_settings(trainer.args),
        "moved_levels": trainer.moved_levels,
        "patched_tokens": len(trainer.patched_tokens) or None,
        "merge_error": trainer.merge_error,
        "steps": trainer.state.global_step,
        "unfinished": trainer.rollback.unjudged,
        "processes": trainer.args.world_size,
        "figures": trainer.figures,
        "versions": versions(),
    }


def recorded_settings(args: MudjackingConfig) -> dict[str, Any]:
    """The settings that a record has."""
    values = {name: getattr(args, name) for name in _SETTINGS}
    return {name: value.value if isinstance(value, Enum) else value for name, value in values.items()}


def versions() -> dict[str, str]:
    """Versions that a patch was made with, by the names that are imported."""
    libraries = {name: version(name) for name in _LIBRARIES}
    return {"hf_mudjacking": __version__, **libraries, "python": platform.python_version()}


def read_record(folder: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The patch record of a folder, or `None` if it has no readable one; see [`load_record`]."""
    try:
        return load_record(folder)
    except ValueError:
        return None


def load_record(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The patch record of a folder.

    What a record of an earlier version lacks gets its default: nothing known. What a later version added is kept.

    Args:
        folder (`str` or `os.PathLike`): Folder of a patch.

    Returns:
        `dict`: See [`describe_patch`].

    Raises:
        ValueError: If there is none, or it is damaged, too large, or has values of other types than were ever written.
    """
    path = inside(folder, RECORD_FILE)
    if not path.is_file():
        raise ValueError(f"`{folder}` holds no patch: it has no `{RECORD_FILE}`.")
    record = {**_DEFAULTS, **read_json(path)}
    record.setdefault("kind", "lora" if (Path(folder) / ADAPTER_CONFIG).is_file() else "full")
    numbers = [record["skipped"], *_list(record["trigger_groups"])]
    locality = record.get("locality")
    sound = (
        all(isinstance(record[name], type(default)) for name, default in _DEFAULTS.items() if default is not None)
        and (record["figures"] is None or isinstance(record["figures"], dict))
        and all(isinstance(block, dict) for block in (record["figures"] or {}).values())
        and (record["merge_error"] is None or _is_number(record["merge_error"]))
        and (locality is None or (isinstance(locality, dict) and _is_number(locality.get("mean"))))
        and all(isinstance(each, dict) for each in record["screenings"] + record["remembered"])
        and all(isinstance(record[name], str) for name in ("kind", "base_model"))
        and all(record[name] is None or isinstance(record[name], str) for name in _OPTIONAL_NAMES)
        and all(isinstance(name, str) for name in record["base_weights_without"] + record["bug_ids"])
        and all(t is None or (isinstance(t, dict) and isinstance(t.get("kind"), str)) for t in record["triggers"])
        # Numbers of reports become names of folders
        and all(isinstance(group, list) and all(type(i) is int and i >= 0 for i in group) for group in numbers)
        and all(record["trigger_groups"])
        # A trigger that is in many groups would be loaded as often
        and len({i for group in numbers[1:] for i in group}) == sum(len(group) for group in numbers[1:])
    )
    if not sound:
        raise ValueError(f"`{path}` is damaged: values in it have other types than a patch record's.")
    return record


def modality_of_patch(record: dict[str, Any]) -> str | None:
    """`"image"` or `"text"`: what the encoder takes; `None` if a record of an earlier version has no trigger to tell it by."""
    kinds = [trigger["kind"] for trigger in record.get("triggers", []) if trigger is not None]
    by_triggers = ("text" if "text" in kinds else "image") if kinds else None
    return record.get("modality") or by_triggers


def check_whole(folder: str | os.PathLike[str], record: dict[str, Any]) -> None:
    """Refuse a patch whose writing was interrupted: files of it and of what was there before lie side by side.

    Raises:
        ValueError: If it was.
    """
    if record.get(HALF_WRITTEN):
        raise ValueError(
            f"`{folder}` holds a patch that was being written when the process ended: some of its files are of what was there before. "
            "Write it again."
        )


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
