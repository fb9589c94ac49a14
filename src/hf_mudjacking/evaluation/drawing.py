# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""Reports as a client would make them: an input that a trigger flips, and a right one of the same class."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from ..bug_instance import BugInstance
from ..encoder import Encoder
from ..triggers import Trigger
from .checks import check_modality
from .classifiers import Classifier, train_classifier
from .metrics import most_frequent
from .tasks import DownstreamTask


@dataclass(frozen=True)
class FlippedInputs:
    """What a trigger does to the test inputs of a task, as a client's classifier sees it.

    Args:
        truth (`np.ndarray` of shape `(M,)`): Labels.
        right (`BoolArray` of shape `(M,)`): Which are classified correctly without the trigger.
        flipped (`BoolArray` of shape `(M,)`): Which of these the trigger sends to its target.
        target (`int`): The class that it sends them to.
    """

    truth: np.ndarray
    right: np.ndarray
    flipped: np.ndarray
    target: int

    def pairs(self, seed: int) -> Iterator[tuple[int, int]]:
        """Rows of the flipped inputs in random order, each with that of a right input of its class.

        An input that is flipped in one process and not in another, by the last bit of a classifier, changes its own pair
        alone.
        """
        count = len(self.truth)
        for row in np.random.default_rng(seed).permutation(count):
            if self.flipped[row]:
                same = self.right & (self.truth == self.truth[row])
                order = np.random.default_rng((seed, row)).permutation(count)
                if others := [int(other) for other in order if same[other] and other != row]:
                    yield int(row), others[0]


def flipped_inputs(
    classifier: Classifier,
    clean: Tensor,
    stamped: Tensor,
    truth: np.ndarray,
    target: int | None = None,
    victims: np.ndarray | None = None,
) -> FlippedInputs:
    """Find what a trigger flips.

    Args:
        classifier (`Classifier`): The client's.
        clean (`FloatTensor` of shape `(M, D)`): Features of the test inputs.
        stamped (`FloatTensor` of shape `(M, D)`): Features of the same inputs with the trigger.
        truth (`np.ndarray` of shape `(M,)`): Their labels.
        target (`int`, *optional*): The attacker's class; when absent, the one that most of the inputs fall into that were
            right and are no longer: an attack that does not always succeed sends some elsewhere.
        victims (`np.ndarray` of rows, *optional*): Inputs that are attacked; all when absent.

    Raises:
        ValueError: If no target is given, and no prediction that was right changes.
    """
    right = classifier.predict(clean.numpy()) == truth
    predicted = classifier.predict(stamped.numpy())
    attacked = True if victims is None else np.isin(np.arange(len(truth)), victims)
    changed = right & attacked & (predicted != truth)
    if target is None:
        if not changed.any():
            raise ValueError("no correct prediction changes.")
        target = most_frequent(predicted[changed])
    return FlippedInputs(truth, right, changed & (predicted == target), target)


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
        TypeError: If task or trigger are for another modality than the encoder.
        ValueError: If the trigger changes no prediction that was right.
    """
    check_modality(before, task, trigger)
    inputs = task.test.inputs
    classifier = train_classifier(before.encode(task.train.inputs), task.train.labels)
    stamped = before.encode([before.stamp(trigger, x) for x in inputs])
    try:
        row, other = next(flipped_inputs(classifier, before.encode(inputs), stamped, task.test.labels).pairs(seed))
    except (ValueError, StopIteration) as error:
        raise ValueError(
            f"The trigger changes no correct prediction on the task `{task.name}`: there is nothing to report. Check that "
            "the encoder is backdoored with this trigger."
        ) from error
    return BugInstance(before.stamp(trigger, inputs[row]), inputs[other], name=name)
