# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""What a resumed run needs to know besides what `Trainer` keeps: which checkpoint, whose it is, and the metrics of half an interval."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.trainer import OPTIMIZER_NAME, TRAINER_STATE_NAME

from .bug_instance import BugInstance
from .fingerprint import report_sha256
from .output import complete_checkpoints, write_json
from .patch_record import read_record
from .processes import gathered, rank_and_count
from .safe_loading import check_checkpoint, read_json


INTERVAL_FILE = "interval_metrics.json"


def checkpoint_to_resume(output_dir: str | os.PathLike[str], resume: str | bool, has_optimizer: bool) -> str:
    """The checkpoint that a run goes on from.

    Args:
        output_dir (`str` or `os.PathLike`): Folder of the run.
        resume (`str` or `bool`): Folder of a checkpoint, or `True` for the newest complete one of the run.
        has_optimizer (`bool`): Whether the optimiser is to be in a file of its own; FSDP and DeepSpeed have others.

    Raises:
        ValueError: If it is not complete, unsafe, or holds the model alone.
    """
    complete = complete_checkpoints(output_dir)
    if resume is True:
        if not complete:
            raise ValueError(f"There is no complete checkpoint in `{output_dir}`; start without resuming.")
        folder = complete[-1]
    else:
        folder = Path(resume)
        # Its name says the step
        folder = folder.resolve() if folder.is_symlink() else folder
        if folder.resolve() not in [path.resolve() for path in complete_checkpoints(folder.parent)]:
            raise ValueError(
                f"`{folder}` is no complete checkpoint (the process may have been killed while writing it). Complete "
                f"ones in `{output_dir}`: {', '.join(path.name for path in complete) or 'none'}."
            )
    check_checkpoint(folder)
    if has_optimizer and not (folder / OPTIMIZER_NAME).exists():
        raise ValueError(
            f"`{folder}` has no optimizer (`save_only_model`): what would go on is another run. Start without resuming, or from "
            "a checkpoint that was saved whole."
        )
    return str(folder)


def check_same_run(
    checkpoint: str | os.PathLike[str],
    base_weights_sha256: str,
    reports: Sequence[BugInstance],
    settings: Mapping[str, Any],
    clean_inputs_sha256: str | None,
    triggers: Sequence[Mapping[str, Any] | None] | None = None,
) -> None:
    """Refuse a checkpoint of another model, of other reports or clean inputs, or of a run with other settings.

    Args:
        checkpoint (`str` or `os.PathLike`): Its folder.
        base_weights_sha256 (`str`): Of the unpatched model that the trainer has.
        reports (`Sequence[BugInstance]`): The reports that the trainer was given.
        settings (`Mapping[str, Any]`): The settings that a record has, as the trainer has them, and of what stands beside them there
            `feature_source` and `processes`, on which the inputs of a step depend.
        clean_inputs_sha256 (`str`, *optional*): Of the trainer's clean inputs ([`~hf_mudjacking.fingerprint.clean_inputs_sha256`]).
        triggers (`Sequence`, *optional*): Summaries of the triggers that the trainer has; `None` if it has none yet.

    Raises:
        ValueError: If its record names another model, other reports, clean inputs, triggers or settings; what a record does not name
            is not compared, nor is the locality budget, which a run is judged by and not made with. A run may go on for more steps.
    """
    record = read_record(checkpoint) or {}
    base = record.get("base_weights_sha256")
    if base not in (None, base_weights_sha256):
        raise ValueError(
            f"`{checkpoint}` is of a patch of other weights (`{record['base_model']}`, sha256 {base[:12]}…) than those of this "
            f"model (sha256 {base_weights_sha256[:12]}…). Build the trainer with the model that the run began with, unpatched, "
            "or start without resuming."
        )
    skipped = record.get("skipped", [])
    ours = [report_sha256(bug) for number, bug in enumerate(reports) if number not in skipped]
    if record.get("bug_ids") and record["bug_ids"] != ours:
        raise ValueError(
            f"`{checkpoint}` is of a run with other bug instances than these ({len(record['bug_ids'])} there, {len(ours)} here, "
            "compared one by one). Pass the same reports in the same order, or start without resuming."
        )

    # As it comes back from a file
    if triggers is not None and record.get("triggers") and json.loads(json.dumps(triggers)) != record["triggers"]:
        raise ValueError(
            f"`{checkpoint}` is of a run with other triggers than these. Pass the ones that it began with, or none, or start without "
            "resuming."
        )

    beside = {name: record[name] for name in ("feature_source", "processes") if record.get(name)}
    began_with = {**settings, **beside, **record.get("settings", {})}
    # A run may be made longer: the schedule is then that of the longer one
    longer = [name for name in ("max_steps", "num_train_epochs") if settings[name] > began_with[name] > 0]
    may_differ = {"locality_budget", *longer, *(["num_train_epochs"] if settings["max_steps"] > 0 else [])}
    # A longer run may read more of a stream
    there = None if longer else record.get("clean_inputs_sha256")
    if there not in (None, clean_inputs_sha256):
        raise ValueError(
            f"`{checkpoint}` is of a run with other clean inputs than this `train_dataset`. Pass the ones that it began with, or start "
            "without resuming, in another folder."
        )
    different = [
        f"`{name}` was {began_with[name]!r} and is {value!r}"
        for name, value in settings.items()
        if name not in may_differ and began_with[name] != value
    ]
    if different:
        raise ValueError(
            f"`{checkpoint}` is of a run with other settings ({', '.join(different)}): optimiser and schedule would go on with the "
            "old ones, and the record name the new. Pass the settings that it began with, or start without resuming, in another "
            "folder."
        )


def where_it_was(checkpoint: str | os.PathLike[str]) -> tuple[int, bool]:
    """The step that a checkpoint is of, and whether the run stopped there of itself, before its last step."""
    state = read_json(Path(checkpoint) / TRAINER_STATE_NAME)
    control = state.get("stateful_callbacks", {}).get("TrainerControl", {}).get("args", {})
    step = state["global_step"]
    return step, bool(control.get("should_training_stop")) and step < state["max_steps"]


def save_interval(folder: str | os.PathLike[str], rows: Sequence[tuple[int, Tensor]]) -> None:
    """Keep what was measured since the last log, so that a resumed run logs, and stops by, what an uninterrupted one does.

    `loss` itself, which the base class keeps in memory, is the exception: the first one after a resume is of fewer steps.

    Args:
        folder (`str` or `os.PathLike`): The checkpoint, of which process 0 writes.
        rows (`Sequence[tuple[int, Tensor]]`): Of this process, number of inputs and mean values of each batch.
    """
    of_each = gathered([(count, values.tolist()) for count, values in rows])
    if rank_and_count()[0] == 0:
        write_json(Path(folder) / INTERVAL_FILE, {"of_each_process": of_each})


def load_interval(folder: str | os.PathLike[str], device: torch.device) -> list[tuple[int, Tensor]]:
    """What [`save_interval`] kept of this process; nothing from a checkpoint of an earlier version, or of another number of
    processes."""
    path = Path(folder) / INTERVAL_FILE
    rank, processes = rank_and_count()
    of_each = read_json(path)["of_each_process"] if path.is_file() else []
    if len(of_each) != processes:
        return []
    return [(count, torch.tensor(values, device=device)) for count, values in of_each[rank]]
