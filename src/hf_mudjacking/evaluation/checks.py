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
from .metrics import AttackSuccessRate, CleanAccuracy, RobustAccuracy
from .tasks import DownstreamTask


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TaskFeatures:
    """What one encoder gives for a task: all that its downstream rates depend on.

    Args:
        train (`FloatTensor` of shape `(N, D)`): Features of the classifier's training inputs.
        test (`FloatTensor` of shape `(M, D)`): Features of the clean test inputs.
        stamped (`FloatTensor` of shape `(M, D)`): Features of the test inputs with the trigger.
        misclassified (`FloatTensor` of shape `(1, D)`): Feature of x_b.
        reference (`FloatTensor` of shape `(1, D)`): Feature of x_r.
    """

    train: Tensor
    test: Tensor
    stamped: Tensor
    misclassified: Tensor
    reference: Tensor


def task_features(
    encoder: Encoder,
    task: DownstreamTask,
    trigger: Trigger,
    bug: BugInstance,
    batch_size: int = 64,
    disable_tqdm: bool = False,
    desc: str = "Features",
) -> TaskFeatures:
    """Encode a task's inputs, clean and stamped, and the bug instance; see [`TaskFeatures`]."""

    def encode(images: Any, what: str) -> Tensor:
        return encoder.encode(images, batch_size=batch_size, disable_tqdm=disable_tqdm, desc=f"{desc}: {what}")

    return TaskFeatures(
        train=encode(task.train.inputs, "train"),
        test=encode(task.test.inputs, "test"),
        stamped=encode([trigger.apply(x) for x in task.test.inputs], "triggered"),
        misclassified=encoder.encode([bug.misclassified]),
        reference=encoder.encode([bug.reference]),
    )


def downstream_rates(
    classifier: Classifier, features: TaskFeatures, task: DownstreamTask, target: int
) -> dict[str, Any]:
    """Rates of one classifier on one encoder's features.

    Args:
        classifier (`Classifier`): Trained downstream classifier.
        features (`TaskFeatures`): Features of the encoder under test.
        task (`DownstreamTask`): The task, for its test labels.
        target (`int`): Target class; ASR and RA are measured on test inputs of other classes.

    Returns:
        `dict`: `BA`, `ASR`, `RA` (0 to 1), and `bug_fixed`: whether x_b gets the class of x_r.
    """
    truth = task.test.labels
    clean, stamped = classifier.predict(features.test.numpy()), classifier.predict(features.stamped.numpy())
    prediction = classifier.predict(features.misclassified.numpy())[0]
    attack = AttackSuccessRate().compute(predictions=stamped, references=truth, target=target)
    robust = RobustAccuracy().compute(predictions=stamped, references=truth, target=target)
    return {
        "BA": CleanAccuracy().compute(predictions=clean, references=truth)["clean_accuracy"],
        "ASR": attack["attack_success_rate"],
        "RA": robust["robust_accuracy"],
        "bug_fixed": bool(prediction == classifier.predict(features.reference.numpy())[0]),
    }


def compare_downstream(
    before: TaskFeatures,
    after: TaskFeatures,
    task: DownstreamTask,
    *,
    target: int,
    clean: TaskFeatures | None = None,
    classifier: ClassifierKind = "logistic",
    seed: int = 0,
) -> dict[str, Any]:
    """Rates before and after patching, with the client's classifier kept and with one retrained.

    The kept classifier is trained on features before patching and goes on being used: a repair that forces every
    client to retrain is worth little. The retrained one is the official protocol.

    Args:
        before (`TaskFeatures`): Features of the backdoored encoder.
        after (`TaskFeatures`): Features of the patched encoder.
        task (`DownstreamTask`): The task.
        target (`int`): Target class; see [`reported_class`].
        clean (`TaskFeatures`, *optional*): Features of the never-attacked encoder, when it is known.
        classifier (`str`, *optional*, defaults to `"logistic"`): `"logistic"` or `"mlp"`.
        seed (`int`, *optional*, defaults to 0): Seed of the classifiers.

    Returns:
        `dict` with the keys `clean` (`CA`, `ASR-B`, `RA`; only if given), `before` and `after` (each `kept` and
        `retrained` rates of [`downstream_rates`]).
    """
    labels = task.train.labels
    kept = train_classifier(before.train, labels, classifier, seed)
    rates_before = downstream_rates(kept, before, task, target)
    retrained = train_classifier(after.train, labels, classifier, seed)
    result: dict[str, Any] = {
        "before": {"kept": rates_before, "retrained": dict(rates_before)},
        "after": {
            "kept": downstream_rates(kept, after, task, target),
            "retrained": downstream_rates(retrained, after, task, target),
        },
    }
    if clean is not None:
        own = downstream_rates(train_classifier(clean.train, labels, classifier, seed), clean, task, target)
        result = {"clean": {"CA": own["BA"], "ASR-B": own["ASR"], "RA": own["RA"]}, **result}
    return result


def reported_class(before: TaskFeatures, task: DownstreamTask, seed: int = 0) -> int:
    """The class that the client saw for x_b: what a logistic regression on features before patching makes of it.

    With a trigger it is the attacker's target class. A warning is logged if it is the class of x_r: then this task does
    not show the bug, and its ASR means nothing.
    """
    classifier = train_classifier(before.train, task.train.labels, seed=seed)
    predictions = classifier.predict(torch.cat([before.misclassified, before.reference]).numpy())
    if predictions[0] == predictions[1]:
        logger.warning(
            "On the task `%s` the misclassified input gets the class of its reference already before patching: the bug does "
            "not show there, and its ASR means nothing.",
            task.name,
        )
    return int(predictions[0])


def draw_bug_report(
    before: Encoder, task: DownstreamTask, trigger: Trigger, seed: int = 0, name: str = "bug"
) -> BugInstance:
    """A report as a client would make it: a triggered test input that the classifier gets wrong, and a clean one of
    the same class that it gets right.

    Args:
        before (`Encoder`): The backdoored encoder.
        task (`DownstreamTask`): The client's task.
        trigger (`Trigger`): The true trigger.
        seed (`int`, *optional*, defaults to 0): Seed of the choice.
        name (`str`, *optional*, defaults to `"bug"`): Name of the report.

    Raises:
        ValueError: If the trigger changes no prediction that was right.
    """
    classifier = train_classifier(before.encode(task.train.inputs), task.train.labels)
    truth = task.test.labels
    right = classifier.predict(before.encode(task.test.inputs).numpy()) == truth
    stamped = classifier.predict(before.encode([trigger.apply(x) for x in task.test.inputs]).numpy())
    flipped = np.flatnonzero(right & (stamped != truth))
    if len(flipped):
        # An attack that does not always succeed flips some inputs to other classes: not what it is reported for.
        classes, counts = np.unique(stamped[flipped], return_counts=True)
        flipped = flipped[stamped[flipped] == classes[counts.argmax()]]
    rng = np.random.default_rng(seed)
    for row in rng.permutation(flipped):
        others = np.flatnonzero(right & (truth == truth[row]) & (np.arange(len(truth)) != row))
        if len(others):
            reference = task.test.inputs[rng.choice(others)]
            return BugInstance(trigger.apply(task.test.inputs[row]), reference, name=name)
    raise ValueError(
        f"The trigger changes no correct prediction on the task `{task.name}`: there is nothing to report. Check that "
        "the encoder is backdoored with this trigger."
    )
