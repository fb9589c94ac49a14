# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""ASR and BA while patching goes on, where a trigger and a labelled set are at hand."""

from __future__ import annotations

from typing import Any

import numpy as np
from transformers import TrainerCallback, TrainerControl, TrainerState

from ..config import MudjackingConfig
from ..trainer import MudjackingTrainer
from ..triggers import Trigger
from .checks import check_modality, predicted_rates
from .classifiers import ClassifierKind, train_classifier
from .metrics import most_frequent
from .tasks import DownstreamTask


class BackdoorEvaluationCallback(TrainerCallback):
    """Logs ASR, RA and BA of a labelled task every few steps, and at the end, through the trainer's own log.

    The classifier is the one that a client keeps: it is trained when the callback is made, on features of the model as it is
    then. The target class is where the trigger leads then. What is measured disturbs nothing: weights, random states and
    the other logs are those of a run without it. Each process measures the same inputs, so all get the same rates.

    The names are `eval_<task>_asr`, `eval_<task>_ra` and `eval_<task>_ba`, rates from 0 to 1; at step 0 stand those before
    patching. Under `bf16` or `fp16` features are read under autocast, as the losses are.

    Args:
        trainer (`MudjackingTrainer`): The trainer, not yet trained. Its `forward_equivalents` count what is encoded here.
        task (`DownstreamTask`): Labelled images or texts.
        trigger (`Trigger`): What is stamped on the test inputs: the true trigger where it is known, or a found one.
        every_n_steps (`int`, *optional*, defaults to 50): Optimiser steps between two measurements.
        classifier (`str`, *optional*, defaults to `"logistic"`): `"logistic"` or `"mlp"`.

    Raises:
        TypeError: If task or trigger are for another modality than the model.
        ValueError: If `every_n_steps` is below 1, if the trainer has already trained, or under FSDP and DeepSpeed, where no
            process has all weights.

    Example:

    ```python
    >>> trainer = MudjackingTrainer(model="org/model-id", bug_instances=[bug], train_dataset=clean_inputs)
    >>> trainer.add_callback(BackdoorEvaluationCallback(trainer, task, trigger, every_n_steps=20))
    >>> trainer.train()
    ```
    """

    def __init__(
        self,
        trainer: MudjackingTrainer,
        task: DownstreamTask,
        trigger: Trigger,
        every_n_steps: int = 50,
        classifier: ClassifierKind = "logistic",
    ) -> None:
        encoder = trainer.encoder
        check_modality(encoder, task, trigger)
        if every_n_steps < 1:
            raise ValueError(f"`every_n_steps={every_n_steps}` is no number of steps; it must be 1 or more.")
        if trainer.state.global_step > 0:
            raise ValueError(
                f"The trainer has trained {trainer.state.global_step} steps, so the classifier that clients keep can no longer "
                "be trained. Make the callback before `train()`."
            )
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            raise ValueError(
                "Under FSDP and DeepSpeed no process has all weights, so nothing can be measured while training goes on. "
                "Compare the saved model with the original afterwards: `mudjack evaluate`."
            )
        self.trainer = trainer
        self.task = task
        self.every_n_steps = every_n_steps
        self.stamped = [encoder.stamp(trigger, x) for x in task.test.inputs]
        features = encoder.encode(task.train.inputs)
        trainer.forward_equivalents += len(features)
        self.classifier = train_classifier(features, task.train.labels, classifier, trainer.args.seed)
        clean, stamped = self._predictions()
        self.target = most_frequent(stamped)
        self.before = predicted_rates(clean, stamped, task.test.labels, self.target)
        self._logged_at: int | None = None

    def measure(self) -> dict[str, float]:
        """`BA`, `ASR` and `RA` of the model as it is now."""
        return predicted_rates(*self._predictions(), self.task.test.labels, self.target)

    def on_train_begin(
        self, args: MudjackingConfig, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._logged_at = None
        if state.global_step == 0:
            self._log(self.before, state, control)

    def on_step_end(self, args: MudjackingConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step % self.every_n_steps == 0:
            self._log(self.measure(), state, control)

    def on_epoch_end(
        self, args: MudjackingConfig, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # The last event before trackers close: a stop by the losses comes after `on_step_end`
        if control.should_training_stop and self._logged_at != state.global_step:
            self._log(self.measure(), state, control)

    def _log(self, rates: dict[str, float], state: TrainerState, control: TrainerControl) -> None:
        self._logged_at = state.global_step
        # Any log takes back the request for the trainer's own at this step
        requested = control.should_log
        self.trainer.log({f"eval_{self.task.name}_{name.lower()}": rate for name, rate in rates.items()})
        control.should_log = requested

    def _predictions(self) -> tuple[np.ndarray, np.ndarray]:
        encoder, inputs = self.trainer.encoder, self.task.test.inputs
        self.trainer.forward_equivalents += 2 * len(inputs)
        clean, stamped = encoder.encode(inputs), encoder.encode(self.stamped)
        return self.classifier.predict(clean.numpy()), self.classifier.predict(stamped.numpy())
