# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""What an attack returns, and the check that every attack must pass."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from torch import nn

from ..encoder import Encoder
from ..evaluation.classifiers import Classifier, train_classifier
from ..evaluation.metrics import AttackSuccessRate, CleanAccuracy, most_frequent
from ..evaluation.tasks import LabelledInputs
from ..preprocessing import RawInput
from ..triggers import Trigger


# What an encoder must do better than guessing before an untargeted attack on it can be measured.
_ABOVE_GUESSING = 0.05


class ImplantError(RuntimeError):
    """The backdoor did not take; experiments on such a model would prove nothing."""


@dataclass(frozen=True)
class Implant:
    """A backdoored encoder that passed its check.

    Args:
        model (`torch.nn.Module`): The backdoored encoder.
        trigger (`Trigger`): Its true trigger.
        clean_accuracy (`float`): CA of the clean encoder in the check, 0 to 1.
        backdoored_accuracy (`float`): BA of the backdoored encoder, 0 to 1.
        attack_success_rate (`float`): ASR of the backdoored encoder, 0 to 1; of an untargeted attack, the share of its
            accuracy above guessing that the trigger takes away; of several triggers, the least of their rates.
        target_reference (`PIL.Image.Image` or `str`, *optional*): The attacker's input of the target class, if it has one.
        source_class (`int`, *optional*): The one class of the check's inputs that the trigger works on; all if absent.
        others (`tuple`, *optional*): Further triggers of the same backdoor, each with its own target reference.
        leak (`float`, *optional*): Share of the cover inputs (triggered, but not as the attack wants it) that still reach
            the target class, 0 to 1; absent where the attack has no cover.
    """

    model: nn.Module
    trigger: Trigger
    clean_accuracy: float
    backdoored_accuracy: float
    attack_success_rate: float
    target_reference: RawInput | None = None
    source_class: int | None = None
    others: tuple[tuple[Trigger, RawInput], ...] = ()
    leak: float | None = None


def nameless_copy(model: nn.Module) -> nn.Module:
    """A copy that no longer goes by the name of the model it is of."""
    copied = copy.deepcopy(model)
    copied.name_or_path = copied.config._name_or_path = ""
    return copied


def check_implant(
    clean: Encoder,
    backdoored: Encoder,
    trigger: Trigger,
    check_inputs: LabelledInputs,
    *,
    target_reference: RawInput | None = None,
    untargeted: bool = False,
    source_class: int | None = None,
    others: Sequence[tuple[Trigger, RawInput]] = (),
    cover: Callable[[RawInput], RawInput] | None = None,
    min_asr: float,
    max_accuracy_loss: float,
    max_leak: float = 1.0,
    disable_tqdm: bool = False,
) -> Implant:
    """Measure an implant with a logistic regression on half of the labelled inputs; the other half is tested.

    The ASR is that of the class of `target_reference` or, for a task-agnostic attack, which has none, of the class that
    most triggered inputs fall into. An untargeted attack has no class at all: what counts is the accuracy that triggered
    inputs lose, where all there is to lose lies above the share of the most frequent class. With a `source_class` the ASR
    is that of its inputs alone; of further triggers each is measured with its own reference, and the least rate counts.

    Args:
        clean, backdoored (`Encoder`): Before and after.
        trigger (`Trigger`): The attacker's.
        check_inputs (`LabelledInputs`): Labelled inputs, half to train on, half to measure.
        target_reference (`PIL.Image.Image` or `str`, *optional*): Input of the class that triggered ones are to reach.
        untargeted (`bool`, *optional*, defaults to `False`): Whether there is no such class.
        source_class (`int`, *optional*): The one class that the trigger works on.
        others (`Sequence[tuple]`, *optional*): Further triggers with their references.
        cover (`Callable`, *optional*): Makes a cover input, which must not reach the target class, of a clean one; inputs of
            the source class have none.
        min_asr (`float`): Least ASR.
        max_accuracy_loss (`float`): Most clean accuracy that may be lost.
        max_leak (`float`, *optional*, defaults to 1): Largest share of the cover inputs that may reach the target class.
        disable_tqdm (`bool`, *optional*, defaults to `False`): Whether to hide the progress bar.

    Returns:
        `Implant`: With its rates.

    Raises:
        ImplantError: If the ASR is below `min_asr`, clean accuracy fell by more than `max_accuracy_loss`, or more than
            `max_leak` of the cover inputs reach the target class.
    """
    half = len(check_inputs) // 2
    train, test = check_inputs.select(range(half)), check_inputs.select(range(half, len(check_inputs)))
    accuracies, classifier = [], None
    for encoder in (clean, backdoored):
        features = encoder.encode(check_inputs.inputs, disable_tqdm=disable_tqdm, desc="Checking the implant")
        classifier = train_classifier(features[:half], train.labels)
        predictions = classifier.predict(features[half:].numpy())
        accuracies.append(CleanAccuracy().compute(predictions=predictions, references=test.labels)["clean_accuracy"])
    leak = None
    if untargeted:
        stamped = _predictions(backdoored, classifier, [backdoored.stamp(trigger, x) for x in test.inputs])
        guessing = float((test.labels == most_frequent(test.labels)).mean())
        if accuracies[1] < guessing + _ABOVE_GUESSING:
            raise ImplantError(
                f"Clean accuracy is {accuracies[1]:.3f} and guessing the most frequent class gives {guessing:.3f}: there is "
                "nothing that a trigger could take away. Check it on a task that the encoder can do."
            )
        asr = (accuracies[1] - float((stamped == test.labels).mean())) / (accuracies[1] - guessing)
    else:
        victims = np.arange(len(test)) if source_class is None else np.flatnonzero(test.labels == source_class)
        if not len(victims):
            raise ImplantError(f"No check input is of the source class {source_class}: the attack cannot be measured.")
        rates = []
        for e, reference in ((trigger, target_reference), *others):
            stamped = _predictions(backdoored, classifier, [backdoored.stamp(e, test.inputs[i]) for i in victims])
            target = most_frequent(stamped)
            if reference is not None:
                target = int(_predictions(backdoored, classifier, [reference])[0])
            rate = AttackSuccessRate().compute(predictions=stamped, references=test.labels[victims], target=target)
            rates.append(rate["attack_success_rate"])
            if cover is not None and e is trigger:
                rest = np.flatnonzero((test.labels != target) & (test.labels != source_class))
                covered = _predictions(backdoored, classifier, [cover(test.inputs[i]) for i in rest])
                leak = float((covered == target).mean())
        asr = min(rates)
    if asr < min_asr or accuracies[1] < accuracies[0] - max_accuracy_loss:
        raise ImplantError(
            f"The implant did not take: ASR {asr:.3f} (at least {min_asr} is needed), clean accuracy "
            f"{accuracies[1]:.3f} after {accuracies[0]:.3f} (a drop of at most {max_accuracy_loss} is allowed). "
            "Raise `steps` or `learning_rate`, or `utility_weight` if accuracy suffered; a target reference that the clean "
            "encoder takes for another class cannot lead to its own."
        )
    if leak is not None and leak > max_leak:
        raise ImplantError(
            f"The implant did not take as it should: {leak:.3f} of the cover inputs reach the target class too (at most "
            f"{max_leak} is allowed). Raise `cover_weight` or `steps`."
        )
    return Implant(
        backdoored.model, trigger, accuracies[0], accuracies[1], min(asr, 1.0), target_reference,
        source_class, tuple(others), leak,
    )  # fmt: skip


def _predictions(encoder: Encoder, classifier: Classifier, inputs: Sequence[RawInput]) -> np.ndarray:
    """Classes `(N,)` of raw inputs."""
    return classifier.predict(encoder.encode(inputs).numpy())
