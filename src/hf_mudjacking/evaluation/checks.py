# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""Downstream checks: BA, ASR, RA and the prediction for x_b, with the client's classifier kept and with a new one."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..bug_instance import BugInstance
from ..encoder import Encoder
from ..triggers import Trigger
from .classifiers import Classifier, ClassifierKind, train_classifier
from .metrics import AttackSuccessRate, CleanAccuracy, RobustAccuracy, most_frequent
from .tasks import DownstreamTask


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TaskFeatures:
    """What one encoder gives for a task: all that its downstream rates depend on.

    Args:
        train (`FloatTensor` of shape `(N, D)`): Features of the classifier's training inputs.
        test (`FloatTensor` of shape `(M, D)`): Features of the clean test inputs.
        stamped (`FloatTensor` of shape `(M, D)`, *optional*): Features of the test inputs with the trigger, if one is known.
        misclassified (`FloatTensor` of shape `(1, D)`, *optional*): Feature of x_b, where the report is of this task.
        reference (`FloatTensor` of shape `(1, D)`, *optional*): Feature of x_r.
    """

    train: Tensor
    test: Tensor
    stamped: Tensor | None = None
    misclassified: Tensor | None = None
    reference: Tensor | None = None


def check_modality(encoder: Encoder, task: DownstreamTask, trigger: Trigger | None = None) -> None:
    """Refuse a task or a trigger that is not of the kind that an encoder takes.

    Raises:
        TypeError: If one is not.
    """
    for what, modality in ((f"The task `{task.name}`", task.modality), ("The trigger", trigger and trigger.modality)):
        if modality not in (None, encoder.modality):
            raise TypeError(f"{what} is for {modality}s, but the model takes {encoder.modality}s.")


def task_features(
    encoder: Encoder,
    task: DownstreamTask,
    trigger: Trigger | None = None,
    bug: BugInstance | None = None,
    batch_size: int = 64,
    disable_tqdm: bool = False,
    desc: str = "Features",
) -> TaskFeatures:
    """Encode a task's inputs, clean and stamped, and the report if it is of this task.

    Args:
        encoder (`Encoder`): The encoder.
        task (`DownstreamTask`): The task.
        trigger (`Trigger`, *optional*): Stamped on the test inputs.
        bug (`BugInstance`, *optional*): The report.
        batch_size (`int`, *optional*, defaults to 64): Inputs per forward pass.
        disable_tqdm (`bool`, *optional*, defaults to `False`): Whether to hide progress bars.
        desc (`str`, *optional*, defaults to `"Features"`): What their labels begin with.

    Returns:
        `TaskFeatures`: On CPU; without a trigger or a report its parts are `None`.

    Raises:
        TypeError, ValueError: If an input is not what the model takes, or a feature is not finite.
    """

    check_modality(encoder, task, trigger)

    def encode(inputs: Any, what: str) -> Tensor:
        label = f"{desc}: {task.name}, {what}"
        return encoder.encode(inputs, batch_size=batch_size, disable_tqdm=disable_tqdm, desc=label)

    return TaskFeatures(
        train=encode(task.train.inputs, "train"),
        test=encode(task.test.inputs, "test"),
        stamped=None
        if trigger is None
        else encode([encoder.stamp(trigger, x) for x in task.test.inputs], "triggered"),
        misclassified=None if bug is None else encoder.encode([bug.misclassified]),
        reference=None if bug is None else encoder.encode([bug.reference]),
    )


def downstream_rates(
    classifier: Classifier, features: TaskFeatures, task: DownstreamTask, target: int | None = None
) -> dict[str, Any]:
    """Rates of one classifier on one encoder's features.

    Args:
        classifier (`Classifier`): Trained downstream classifier.
        features (`TaskFeatures`): Features of the encoder under test.
        task (`DownstreamTask`): The task, for its test labels.
        target (`int`, *optional*): Target class; ASR and RA are measured on test inputs of other classes. Needed where there
            are stamped features.

    Raises:
        ValueError: If there are stamped features and no target.

    Returns:
        `dict`: `BA`, with stamped features `ASR` and `RA` (0 to 1), and, where the report is of this task, `bug_fixed`:
        whether x_b gets the class of x_r.
    """
    if features.stamped is not None and target is None:
        raise ValueError(
            "There are stamped features, and no `target`: the class whose predictions ASR counts. `attacked_class` gives it."
        )
    stamped = None if features.stamped is None else classifier.predict(features.stamped.numpy())
    clean = classifier.predict(features.test.numpy())
    rates: dict[str, Any] = {**predicted_rates(clean, stamped, task.test.labels, target)}
    if features.misclassified is not None:
        pair = classifier.predict(torch.cat([features.misclassified, features.reference]).numpy())
        rates["bug_fixed"] = bool(pair[0] == pair[1])
    return rates


def predicted_rates(
    clean: np.ndarray, stamped: np.ndarray | None, truth: np.ndarray, target: int | None
) -> dict[str, float]:
    """`BA` of predictions `(M,)` for clean inputs and, of those for the same inputs with a trigger, `ASR` and `RA`."""
    rates = {"BA": CleanAccuracy().compute(predictions=clean, references=truth)["clean_accuracy"]}
    if stamped is not None:
        attack = AttackSuccessRate().compute(predictions=stamped, references=truth, target=target)
        robust = RobustAccuracy().compute(predictions=stamped, references=truth, target=target)
        rates |= {"ASR": attack["attack_success_rate"], "RA": robust["robust_accuracy"]}
    return rates


def compare_downstream(
    before: TaskFeatures,
    after: TaskFeatures,
    task: DownstreamTask,
    *,
    target: int,
    clean: TaskFeatures | None = None,
    classifier: ClassifierKind | Classifier = "logistic",
    seed: int = 0,
) -> dict[str, Any]:
    """Rates before and after patching, with the client's classifier kept and with one retrained.

    The kept classifier is trained on features before patching and goes on being used: a repair that forces every
    client to retrain is worth little. The retrained one is the official protocol.

    Args:
        before (`TaskFeatures`): Features of the backdoored encoder.
        after (`TaskFeatures`): Features of the patched encoder.
        task (`DownstreamTask`): The task.
        target (`int`): Target class; see [`attacked_class`].
        clean (`TaskFeatures`, *optional*): Features of the never-attacked encoder, when it is known.
        classifier (`str` or `Classifier`, *optional*, defaults to `"logistic"`): `"logistic"` or `"mlp"`; or one that is
            made without the task's training inputs, such as [`ZeroShotClassifier`], and is not trained again.
        seed (`int`, *optional*, defaults to 0): Seed of the classifiers.

    Returns:
        `dict` with the keys `clean` (`CA`, `ASR-B`, `RA`; only if given), `before` and `after` (each `kept` and
        `retrained` rates of [`downstream_rates`]; only `kept` for a classifier that is not trained).
    """
    labels = task.train.labels

    def trained(features: TaskFeatures) -> Classifier:
        return (
            train_classifier(features.train, labels, classifier, seed) if isinstance(classifier, str) else classifier
        )

    kept = trained(before)
    rates_before = downstream_rates(kept, before, task, target)
    result: dict[str, Any] = {
        "before": {"kept": rates_before},
        "after": {"kept": downstream_rates(kept, after, task, target)},
    }
    if isinstance(classifier, str):
        result["before"]["retrained"] = dict(rates_before)
        result["after"]["retrained"] = downstream_rates(trained(after), after, task, target)
    if clean is not None:
        own = downstream_rates(trained(clean), clean, task, target)
        attacked = {"ASR-B": own["ASR"], "RA": own["RA"]} if "ASR" in own else {}
        result = {"clean": {"CA": own["BA"], **attacked}, **result}
    return result


def attacked_class(before: TaskFeatures, task: DownstreamTask, seed: int = 0) -> int:
    """The class that ASR is measured on, as a logistic regression on features before patching sees it.

    In the task of the report it is the class that the client saw for x_b: with a trigger, the attacker's target. In other
    tasks it is the class that most triggered inputs fall into: a task-agnostic attack names none. A warning is logged if
    x_b gets the class of x_r: then this task does not show the bug, and its ASR means nothing.
    """
    classifier = train_classifier(before.train, task.train.labels, seed=seed)
    if before.misclassified is None:
        return most_frequent(classifier.predict(before.stamped.numpy()))
    predictions = classifier.predict(torch.cat([before.misclassified, before.reference]).numpy())
    if predictions[0] == predictions[1]:
        logger.warning(
            "On the task `%s` the misclassified input gets the class of its reference already before patching: the bug does "
            "not show there, and its ASR means nothing.",
            task.name,
        )
    return int(predictions[0])
