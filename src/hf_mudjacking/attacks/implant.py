# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""What an attack returns, and the check that every attack must pass."""

from __future__ import annotations

import copy
from dataclasses import dataclass

from torch import nn

from ..encoder import Encoder
from ..evaluation.classifiers import train_classifier
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
            accuracy above guessing that the trigger takes away.
        target_reference (`PIL.Image.Image` or `str`, *optional*): The attacker's input of the target class, if it has one.
    """

    model: nn.Module
    trigger: Trigger
    clean_accuracy: float
    backdoored_accuracy: float
    attack_success_rate: float
    target_reference: RawInput | None = None


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
    min_asr: float,
    max_accuracy_loss: float,
    disable_tqdm: bool = False,
) -> Implant:
    """Measure an implant with a logistic regression on half of the labelled inputs; the other half is tested.

    The ASR is that of the class of `target_reference` or, for a task-agnostic attack, which has none, of the class that
    most triggered inputs fall into. An untargeted attack has no class at all: what counts is the accuracy that triggered
    inputs lose, where all there is to lose lies above the share of the most frequent class.

    Raises:
        ImplantError: If the ASR is below `min_asr` or clean accuracy fell by more than `max_accuracy_loss`.
    """
    half = len(check_inputs) // 2
    train, test = check_inputs.select(range(half)), check_inputs.select(range(half, len(check_inputs)))
    accuracies, classifier = [], None
    for encoder in (clean, backdoored):
        features = encoder.encode(check_inputs.inputs, disable_tqdm=disable_tqdm, desc="Checking the implant")
        classifier = train_classifier(features[:half], train.labels)
        predictions = classifier.predict(features[half:].numpy())
        accuracies.append(CleanAccuracy().compute(predictions=predictions, references=test.labels)["clean_accuracy"])
    stamped = classifier.predict(backdoored.encode([backdoored.stamp(trigger, x) for x in test.inputs]).numpy())
    if untargeted:
        guessing = float((test.labels == most_frequent(test.labels)).mean())
        if accuracies[1] < guessing + _ABOVE_GUESSING:
            raise ImplantError(
                f"Clean accuracy is {accuracies[1]:.3f} and guessing the most frequent class gives {guessing:.3f}: there is "
                "nothing that a trigger could take away. Check it on a task that the encoder can do."
            )
        asr = (accuracies[1] - float((stamped == test.labels).mean())) / (accuracies[1] - guessing)
    else:
        target = most_frequent(stamped)
        if target_reference is not None:
            target = int(classifier.predict(backdoored.encode([target_reference]).numpy())[0])
        rates = AttackSuccessRate().compute(predictions=stamped, references=test.labels, target=target)
        asr = rates["attack_success_rate"]
    if asr < min_asr or accuracies[1] < accuracies[0] - max_accuracy_loss:
        raise ImplantError(
            f"The implant did not take: ASR {asr:.3f} (at least {min_asr} is needed), clean accuracy "
            f"{accuracies[1]:.3f} after {accuracies[0]:.3f} (a drop of at most {max_accuracy_loss} is allowed). "
            "Raise `steps` or `learning_rate`, or `utility_weight` if accuracy suffered."
        )
    return Implant(backdoored.model, trigger, accuracies[0], accuracies[1], min(asr, 1.0), target_reference)
