# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""Rates of one encoder in a case: with the clients' classifiers kept and with new ones, on all tasks."""

from __future__ import annotations

from typing import Any

from ..bug_instance import to_rgb
from ..encoder import Encoder
from ..evaluation.altered import altered_triggers
from ..evaluation.classifiers import Classifier
from ..evaluation.metrics import AttackSuccessRate, CleanAccuracy, RobustAccuracy
from .case import Case, StampedFeatures


# Test inputs on which altered triggers are measured, and clean inputs on which one is optimised anew.
_ALTERED_ON, _OPTIMISED_ON = 600, 256
# How far ASR may end above ASR-B, RA under BA, and BA from before. A goal that is met exactly is met.
ASR_GOAL, RA_GOAL, BA_GOAL = 0.02, 0.03, 0.005
_ROUNDING = 1e-9


def case_rates(case: Case, after: list[StampedFeatures]) -> dict[str, Any]:
    """The rates of `report.json`: of the never-attacked encoder, before and after, kept and retrained, on all tasks.

    Of several triggers the highest ASR and the lowest RA count.
    """
    first, *others = [_task_rates(case, number, features) for number, features in enumerate(after)]
    names = [task.name for task in case.tasks[1:]]
    return {**first, **({"other_tasks": dict(zip(names, others, strict=True))} if others else {})}


def _task_rates(case: Case, task: int, after: StampedFeatures) -> dict[str, Any]:
    main, *further = case.plan.classifiers
    rates = {kind: _of_one_kind(case, task, after, kind) for kind in case.plan.classifiers}
    return {**rates[main], **({"other_classifiers": {kind: rates[kind] for kind in further}} if further else {})}


def _of_one_kind(case: Case, task: int, after: StampedFeatures, kind: str) -> dict[str, Any]:
    kept, before, clean = case.kept[task][kind], case.before[task], case.clean[task]
    never = _rates(case, task, case.classifier(task, clean, kind), clean)
    old = _rates(case, task, kept, before)
    return {
        "clean": {"CA": never["BA"], "ASR-B": never["ASR"], "RA": never["RA"]},
        "before": {"kept": old, "retrained": dict(old)},
        "after": {
            "kept": _rates(case, task, kept, after),
            "retrained": _rates(case, task, case.classifier(task, after, kind), after),
        },
    }


def _rates(case: Case, task: int, classifier: Classifier, features: StampedFeatures) -> dict[str, float]:
    truth = case.tasks[task].test.labels
    accuracy = CleanAccuracy().compute(predictions=classifier.predict(features.test.numpy()), references=truth)
    attack, robust = [], []
    for stamped, target in zip(features.stamped, case.targets[task], strict=True):
        rows = case.victims(task, target)
        pair = {"predictions": classifier.predict(stamped[rows].numpy()), "references": truth[rows]}
        attack.append(AttackSuccessRate().compute(**pair, target=target)["attack_success_rate"])
        robust.append(RobustAccuracy().compute(**pair, target=target)["robust_accuracy"])
    return {"BA": accuracy["clean_accuracy"], "ASR": max(attack), "RA": min(robust)}


def rates_on_the_way(case: Case, encoder: Encoder) -> dict[str, float]:
    """BA, ASR and RA on the first task with its classifier kept: what is measured while a method is at work."""
    task, kind = case.tasks[0], case.plan.classifiers[0]
    silent = case.sources.disable_tqdm
    test = encoder.encode(task.test.inputs, disable_tqdm=silent, desc="Measuring on the way")
    stamped = [
        encoder.encode([encoder.stamp(e, x) for x in task.test.inputs], disable_tqdm=silent) for e in case.triggers
    ]
    return _rates(case, 0, case.kept[0][kind], StampedFeatures(test[:0], test, stamped))


def altered_rates(case: Case, encoder: Encoder, classifier: Classifier) -> dict[str, float]:
    """ASR of altered versions of the first trigger on the first task; nothing for texts and for triggers that are networks."""
    trigger, task = case.implant.trigger, case.tasks[0]
    if trigger.modality != "image" or trigger.kind == "input-aware":
        return {}
    target = case.targets[0][0]
    rows = case.victims(0, target)
    inputs = [task.test.inputs[row] for row in rows[rows < _ALTERED_ON]]
    reported = case.reports()[0].misclassified
    led_to = case.backdoored.encode([reported])[0]
    # Pictures of several sizes cannot be optimised on together
    images = [to_rgb(x).resize(reported.size) for x in task.train.inputs[:_OPTIMISED_ON]]
    return {
        name: float((classifier.predict(encoder.encode([e.apply(x) for x in inputs]).numpy()) == target).mean())
        for name, e in altered_triggers(trigger, encoder, images, led_to, case.seed).items()
    }


def goals(rates: dict[str, Any]) -> dict[str, bool]:
    """Which goals a task's rates meet, kept and retrained: ASR within 2 points of ASR-B, RA within 3 of BA, BA within half a
    point of before."""
    after = rates["after"].values()
    return {
        "ASR": all(block["ASR"] <= rates["clean"]["ASR-B"] + ASR_GOAL + _ROUNDING for block in after),
        "RA": all(block["RA"] >= block["BA"] - RA_GOAL - _ROUNDING for block in after),
        "BA": all(abs(block["BA"] - rates["before"]["kept"]["BA"]) <= BA_GOAL + _ROUNDING for block in after),
    }
