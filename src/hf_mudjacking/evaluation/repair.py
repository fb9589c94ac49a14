# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""One repair, measured before and after."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from typing import Any

import psutil
import torch

from ..encoder import Encoder
from ..trainer import MudjackingTrainer
from ..triggers import PatchTrigger
from .checks import TaskFeatures, compare_downstream, reported_class, task_features
from .report import library_versions
from .tasks import DownstreamTask


@dataclass(frozen=True)
class MeasuredRepair:
    """Result of [`measured_repair`].

    Args:
        report (`dict`): Rates, triggers, cost, settings and versions, as written to `report.json`.
        before (`TaskFeatures`): Features before patching.
        after (`TaskFeatures`): Features after patching.
    """

    report: dict[str, Any]
    before: TaskFeatures
    after: TaskFeatures


def measured_repair(
    trainer: MudjackingTrainer,
    task: DownstreamTask,
    *,
    true_trigger: PatchTrigger | None = None,
    clean_encoder: Encoder | None = None,
    classifiers: tuple[str, ...] = ("logistic", "mlp"),
) -> MeasuredRepair:
    """Run a trainer, save the patched model, and check its first bug instance downstream, before and after.

    The model is saved to `args.output_dir` before it is measured, so that no failure of a check loses the repair.

    Args:
        trainer (`MudjackingTrainer`): Not yet trained.
        task (`DownstreamTask`): Labelled downstream task.
        true_trigger (`PatchTrigger`, *optional*): The attacker's trigger, when it is known; rates are then measured with
            it, else with the inverted one.
        clean_encoder (`Encoder`, *optional*): The never-attacked encoder, when it is known.
        classifiers (`tuple[str, ...]`, *optional*, defaults to `("logistic", "mlp")`): The first gives the report's
            main figures, the others stand under `other_classifiers`.

    Returns:
        `MeasuredRepair`: Report and features.
    """
    silent, bug = trainer.args.disable_tqdm, trainer.bug_instances[0]
    started = time.perf_counter()
    if trainer.triggers is None:
        trainer.invert_triggers()
    seconds = time.perf_counter() - started
    inversion_forwards = trainer.forward_equivalents

    trigger = true_trigger if true_trigger is not None else trainer.triggers[0]
    before = task_features(trainer.encoder, task, trigger, bug, disable_tqdm=silent, desc="Before patching")
    clean = None
    if clean_encoder is not None:
        clean = task_features(clean_encoder, task, trigger, bug, disable_tqdm=silent, desc="Clean encoder")
    started = time.perf_counter()
    trainer.train()
    seconds += time.perf_counter() - started
    trainer.save_model()
    after = task_features(trainer.encoder, task, trigger, bug, disable_tqdm=silent, desc="After patching")

    target = reported_class(before, task, trainer.args.seed)
    main, *others = [
        compare_downstream(before, after, task, target=target, clean=clean, classifier=kind, seed=trainer.args.seed)
        for kind in classifiers
    ]
    report = {
        **main,
        **({"other_classifiers": dict(zip(classifiers[1:], others, strict=True))} if others else {}),
        "triggers": _trigger_facts(trainer, true_trigger),
        "cost": {
            "inversion_forwards": inversion_forwards,
            "forward_equivalents": trainer.forward_equivalents,
            "steps": trainer.state.global_step,
            "seconds": round(seconds, 2),
            "peak_memory_mb": _peak_memory_mb(),
        },
        "settings": {
            "seed": trainer.args.seed,
            "task": task.name,
            "classifier": classifiers[0],
            "target_class": target,
            "trigger_measured": "inverted" if true_trigger is None else "true",
            "max_steps": trainer.args.max_steps,
            "batch_size": trainer.args.train_batch_size,
            "learning_rate": trainer.args.learning_rate,
            "feature_source": trainer.encoder.feature_source,
        },
        "versions": library_versions(),
    }
    return MeasuredRepair(report, before, after)


def _trigger_facts(trainer: MudjackingTrainer, true_trigger: PatchTrigger | None) -> list[dict[str, Any]]:
    facts = [trigger.summary() for trigger in trainer.triggers]
    for fact, found in zip(facts, trainer.inversions, strict=False):
        fact.update(transfer=round(found.score, 4), evidence=round(found.evidence, 4))
    if true_trigger is not None and trainer.triggers[0].mask.shape == true_trigger.mask.shape:
        facts[0].update(trainer.triggers[0].overlap(true_trigger.mask))
    return facts


def _peak_memory_mb() -> int:
    """Peak memory of the GPU's allocator, or of the process where there is no GPU."""
    if torch.cuda.is_available():
        return round(torch.cuda.max_memory_allocated() / 2**20)
    if sys.platform == "win32":
        return round(psutil.Process().memory_info().peak_wset / 2**20)
    import resource

    unit = 1 if sys.platform == "darwin" else 2**10  # bytes there, kilobytes elsewhere
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20)
