# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""One repair, measured before and after."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from ..encoder import Encoder
from ..output import write_json
from ..patch_record import RECORD_FILE, describe_patch
from ..resuming import where_it_was
from ..trainer import MudjackingTrainer
from ..triggers import Trigger
from .checks import TaskFeatures, attacked_class, check_modality, compare_downstream, task_features
from .classifiers import Classifier, ClassifierKind
from .report import library_versions
from .tasks import DownstreamTask


# What the record of the patch takes of the rates of a task.
_FIGURES = ("clean", "before", "after", "other_classifiers")


@dataclass(frozen=True)
class MeasuredRepair:
    """Result of [`measured_repair`].

    Args:
        report (`dict`): Rates, triggers, cost, settings and versions, as written to `report.json`.
        before (`TaskFeatures`): Features of the report's task before patching.
        after (`TaskFeatures`): Features of the report's task after patching.
        clean (`TaskFeatures`, *optional*): Features of the report's task in the never-attacked encoder, when it is known.
    """

    report: dict[str, Any]
    before: TaskFeatures
    after: TaskFeatures
    clean: TaskFeatures | None = None


def measured_repair(
    trainer: MudjackingTrainer,
    task: DownstreamTask,
    other_tasks: Sequence[DownstreamTask] = (),
    *,
    true_trigger: Trigger | None = None,
    clean_encoder: Encoder | None = None,
    classifiers: tuple[str, ...] = ("logistic", "mlp"),
    ready_classifiers: Mapping[str, Classifier] | None = None,
    resume_from_checkpoint: str | bool | None = None,
) -> MeasuredRepair:
    """Run a trainer, save the patched model, and check its first bug instance downstream, before and after.

    The model is saved to `args.output_dir` before it is measured, so that no failure of a check loses the repair; the
    rates are then added to its record.

    Args:
        trainer (`MudjackingTrainer`): Not yet trained.
        task (`DownstreamTask`): Labelled downstream task that the bug instance is from.
        other_tasks (`Sequence[DownstreamTask]`, *optional*): What other clients do with the same encoder. They stand under
            `other_tasks` in the report.
        true_trigger (`Trigger`, *optional*): The attacker's trigger, when it is known; rates are then measured with it,
            else with the inverted one; of an unverified report, with the best candidate.
        clean_encoder (`Encoder`, *optional*): The never-attacked encoder, when it is known.
        classifiers (`tuple[str, ...]`, *optional*, defaults to `("logistic", "mlp")`): The first gives the report's
            main figures, the others stand under `other_classifiers`.
        ready_classifiers (`Mapping[str, Classifier]`, *optional*): Further ones for the report's task, by name, that are
            not trained on it, such as [`ZeroShotClassifier`].
        resume_from_checkpoint (`str` or `bool`, *optional*): As in [`~MudjackingTrainer.train`].

    Returns:
        `MeasuredRepair`: Report and features of the first task.

    Raises:
        TypeError: If a task or the true trigger is for another modality than the model.
        ValueError: If there is no classifier to train, a ready one has the name of one that is trained, or two tasks share a name.
    """
    kinds: dict[str, ClassifierKind | Classifier] = {kind: kind for kind in classifiers}
    if not kinds or not kinds.keys().isdisjoint(ready_classifiers or {}):
        raise ValueError(
            f"`classifiers` are {tuple(kinds)}, `ready_classifiers` {tuple(ready_classifiers or {})}: at least one of the "
            "former is needed, and no name may stand in both."
        )
    unknown = sorted(set(kinds) - {"logistic", "mlp"})
    if unknown:
        raise ValueError(
            f"`classifiers={classifiers!r}`: {', '.join(unknown)} cannot be trained; name logistic, mlp or both."
        )
    silent, tasks = trainer.args.disable_tqdm, [task, *other_tasks]
    names = [each.name for each in tasks]
    if len(set(names)) < len(names):
        raise ValueError(
            f"The tasks are called {', '.join(names)}; each needs a name of its own, by which its rates are reported."
        )
    for each in tasks:
        check_modality(trainer.encoder, each, true_trigger)
    resumed_at = 0
    if resume_from_checkpoint:
        resumed_at, _ = where_it_was(trainer.take_up(resume_from_checkpoint))
    elif trainer.triggers is None:
        trainer.invert_triggers()
    trigger, measured = true_trigger, "true"
    if trigger is None and trainer.triggers[0] is not None:
        trigger, measured = trainer.triggers[0], "inverted"
    elif trigger is None and not trainer.inversions:
        raise ValueError(
            "The report has no verified trigger, and a resumed run has no candidate to measure with. Pass `true_trigger`, or "
            "resume with `trainer.train(...)` and measure nothing."
        )
    elif trigger is None:
        trigger, measured = trainer.inversions[0].trigger, "unverified"

    def features(encoder: Encoder, desc: str) -> list[TaskFeatures]:
        bugs = [trainer.bug_instances[0], *[None] * len(other_tasks)]
        return [
            task_features(encoder, task, trigger, bug, disable_tqdm=silent, desc=desc)
            for task, bug in zip(tasks, bugs, strict=True)
        ]

    before = features(trainer.encoder, "Before patching")
    clean = [None] * len(tasks) if clean_encoder is None else features(clean_encoder, "Clean encoder")
    started = time.perf_counter()
    trainer.train(resume_from_checkpoint)
    seconds = trainer.inversion_seconds + time.perf_counter() - started
    trainer.save_model()
    after = features(trainer.encoder, "After patching")

    seed = trainer.args.seed
    targets = [attacked_class(*row, seed) for row in zip(before, tasks, strict=True)]
    ready = [{**kinds, **(ready_classifiers or {})}, *[kinds] * len(other_tasks)]
    blocks = [_rates(*row, seed) for row in zip(tasks, before, after, clean, targets, ready, strict=True)]
    report = {
        **blocks[0],
        **({"other_tasks": {other.name: block for other, block in zip(other_tasks, blocks[1:], strict=True)}}
           if other_tasks else {}),
        "triggers": _trigger_facts(trainer, true_trigger, measured),
        "cost": {
            "inversion_forwards": trainer.inversion_forwards,
            "forward_equivalents": trainer.forward_equivalents,
            "steps": trainer.state.global_step,
            **({"resumed_at_step": resumed_at} if resumed_at else {}),
            "seconds": round(seconds, 2),
            "peak_memory_mb": peak_memory_mb(trainer.encoder.device),
        },
        "settings": {
            "seed": seed,
            "task": task.name,
            "classifier": classifiers[0],
            "target_class": targets[0],
            "trigger_measured": measured,
            "max_steps": trainer.args.max_steps,
            "batch_size": trainer.args.train_batch_size,
            "learning_rate": trainer.args.learning_rate,
            "feature_source": trainer.encoder.feature_source,
        },
        "versions": library_versions(),
    }  # fmt: skip
    trainer.figures = {
        task.name: {
            "classifier": classifiers[0],
            "trigger_measured": measured,
            **{name: block[name] for name in _FIGURES if name in block},
        }
        for task, block in zip(tasks, blocks, strict=True)
    }
    if trainer.args.should_save:
        write_json(Path(trainer.args.output_dir) / RECORD_FILE, describe_patch(trainer))
    return MeasuredRepair(report, before[0], after[0], clean[0])


def _rates(
    task: DownstreamTask,
    before: TaskFeatures,
    after: TaskFeatures,
    clean: TaskFeatures | None,
    target: int,
    classifiers: Mapping[str, ClassifierKind | Classifier],
    seed: int,
) -> dict[str, Any]:
    """Rates of one task: those of the first classifier, the others under `other_classifiers`."""
    first, *others = classifiers
    rates = {
        name: compare_downstream(before, after, task, target=target, clean=clean, classifier=classifier, seed=seed)
        for name, classifier in classifiers.items()
    }
    return {**rates[first], **({"other_classifiers": {name: rates[name] for name in others}} if others else {})}


def _trigger_facts(trainer: MudjackingTrainer, true_trigger: Trigger | None, measured: str) -> list[dict[str, Any]]:
    facts: list[dict[str, Any]] = [
        {"kind": None, "description": "unverified, not stamped in training"}
        if trigger is None
        else {**trigger.summary(), "description": trigger.describe()}
        for trigger in trainer.triggers
    ]
    if measured == "unverified":
        facts[0]["description"] += "; ASR and RA are measured with the best candidate"
    for fact, verdict in zip(facts, trainer.verdicts(), strict=False):
        fact.update({name: verdict[name] for name in ("transfer", "evidence") if name in verdict})
    if true_trigger is not None and facts[0]["kind"] == true_trigger.kind:
        facts[0].update(trainer.triggers[0].overlap(true_trigger))
    return facts


def peak_memory_mb(device: torch.device) -> int:
    """Peak memory of the allocator of the GPU that was computed on, or of the process."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20)
    if sys.platform == "win32":
        return round(psutil.Process().memory_info().peak_wset / 2**20)
    import resource

    unit = 1 if sys.platform == "darwin" else 2**10  # bytes there, kilobytes elsewhere
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20)
