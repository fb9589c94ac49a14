# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""`BackdoorEvaluationCallback` logs true rates and disturbs nothing."""

import random

import datasets
import numpy as np
import pytest
import torch
from transformers import TrainerCallback

from hf_mudjacking import BackdoorEvaluationCallback, MudjackingTrainer, TextTrigger
from hf_mudjacking.evaluation import DownstreamTask, draw_bug_report

from .conftest import largest_difference, make_config, weights_of


NAMES = ("eval_digits_asr", "eval_digits_ba", "eval_digits_ra")


@pytest.fixture
def task(backdoored) -> DownstreamTask:
    return DownstreamTask(backdoored.train.select(range(300)), backdoored.test.select(range(120)), "digits")


def make_trainer(backdoored, output_dir, **config):
    return MudjackingTrainer(
        model=backdoored.model(),
        args=make_config(output_dir, **{"max_steps": 7, "learning_rate": 1e-3, **config}),
        bug_instances=[backdoored.bug()],
        train_dataset=backdoored.dataset(64),
        processing_class=backdoored.processor,
        triggers=[backdoored.trigger],
    )


class Recorder(TrainerCallback):
    """What a tracker such as TensorBoard is given: the logs with their step, and what the random states are after each step."""

    def __init__(self) -> None:
        self.logs, self.states = [], []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append((state.global_step, dict(logs)))

    def on_step_end(self, args, state, control, model=None, **kwargs):
        numbers = (torch.rand(1), np.random.rand(), random.random())
        self.states.append((model.training, *map(float, numbers)))

    def of_the_trainer(self):
        """Logs of losses and cosines, without times."""
        return [
            (step, {name: value for name, value in logs.items() if "loss" in name or "cosine" in name})
            for step, logs in self.logs
            if "loss" in logs
        ]

    def measured(self):
        return {step: {name: logs[name] for name in NAMES} for step, logs in self.logs if NAMES[0] in logs}


def test_rates_are_logged_every_few_steps_and_at_the_end(backdoored, task, tmp_path):
    trainer = make_trainer(backdoored, tmp_path)
    callback, recorder = BackdoorEvaluationCallback(trainer, task, backdoored.trigger, every_n_steps=3), Recorder()
    assert callback.target == backdoored.target
    trainer.add_callback(callback)
    trainer.add_callback(recorder)
    trainer.train()
    measured = recorder.measured()
    assert list(measured) == [0, 3, 6, 7]
    # By hand, with the model as it is at the end
    predictions = [
        callback.classifier.predict(trainer.encoder.encode(inputs).numpy())
        for inputs in (task.test.inputs, [backdoored.trigger.apply(x) for x in task.test.inputs])
    ]
    other = task.test.labels != backdoored.target
    assert measured[7] == {
        "eval_digits_ba": pytest.approx((predictions[0] == task.test.labels).mean()),
        "eval_digits_asr": pytest.approx((predictions[1][other] == backdoored.target).mean()),
        "eval_digits_ra": pytest.approx((predictions[1][other] == task.test.labels[other]).mean()),
    }
    assert measured[0]["eval_digits_asr"] > 0.9
    assert measured[7]["eval_digits_asr"] < measured[0]["eval_digits_asr"]
    assert [row["step"] for row in trainer.state.log_history if NAMES[0] in row] == [0, 3, 6, 7]


@pytest.mark.parametrize("logging_steps", [1, 3])
def test_nothing_else_changes(logging_steps, backdoored, task, tmp_path):
    weights, recorders, forwards = [], [], []
    for with_callback in (False, True):
        trainer = make_trainer(backdoored, tmp_path / str(with_callback), logging_steps=logging_steps)
        recorder = Recorder()
        if with_callback:
            trainer.add_callback(BackdoorEvaluationCallback(trainer, task, backdoored.trigger, every_n_steps=3))
        trainer.add_callback(recorder)
        trainer.train()
        weights.append(weights_of(trainer.model))
        recorders.append(recorder)
        forwards.append(trainer.forward_equivalents)
    assert largest_difference(*weights) == 0.0
    without, with_it = recorders
    # Step 3 has a measurement and a log of its own: neither swallows the other
    assert with_it.of_the_trainer() == without.of_the_trainer()
    assert len(without.of_the_trainer()) == 7 // logging_steps
    assert with_it.states == without.states
    # Classifier, then before, at 3, 6 and 7, each clean and stamped
    assert forwards[1] - forwards[0] == len(task.train) + 4 * 2 * len(task.test)


def test_a_stop_by_the_losses_is_measured_too(backdoored, task, tmp_path):
    trainer = make_trainer(
        backdoored, tmp_path, stop_when_fixed=True, stop_effectiveness=-0.999, stop_locality=-0.999, stop_generalizability=-0.999,
        logging_steps=2, max_steps=20,
    )  # fmt: skip
    recorder = Recorder()
    trainer.add_callback(BackdoorEvaluationCallback(trainer, task, backdoored.trigger, every_n_steps=10))
    trainer.add_callback(recorder)
    trainer.train()
    assert trainer.state.global_step == 2
    assert list(recorder.measured()) == [0, 2]


def test_texts(por, tmp_path):
    """The patch of token embeddings, too: the classifier is of the model before any of them is changed."""
    encoder, task, implant = por
    bug = draw_bug_report(encoder, task, implant.trigger, 0)
    task = DownstreamTask(task.train.select(range(300)), task.test.select(range(150)), "texts")
    before = weights_of(encoder.model)
    trainer = MudjackingTrainer(
        model=encoder.model,
        args=make_config(tmp_path, max_steps=6, per_device_train_batch_size=16, feature_source="mean"),
        bug_instances=[bug],
        train_dataset=_texts(task.train.inputs[:100]),
        processing_class=encoder.processing_class,
        triggers=[implant.trigger],
    )
    callback = BackdoorEvaluationCallback(trainer, task, implant.trigger, every_n_steps=4)
    trainer.add_callback(callback)
    try:
        trainer.train()
    finally:
        encoder.model.load_state_dict(before)
    rows = {row["step"]: row for row in trainer.state.log_history if "eval_texts_asr" in row}
    assert list(rows) == [0, 4, 6]
    assert rows[0]["eval_texts_asr"] > 0.95
    assert rows[6]["eval_texts_asr"] < 0.5
    assert rows[6]["eval_texts_ba"] == rows[0]["eval_texts_ba"]


def _texts(texts):
    return datasets.Dataset.from_dict({"text": list(texts)})


def test_what_cannot_be_measured_is_refused(backdoored, task, tmp_path):
    trainer = make_trainer(backdoored, tmp_path, max_steps=1)
    with pytest.raises(TypeError, match="The trigger is for texts, but the model takes images"):
        BackdoorEvaluationCallback(trainer, task, TextTrigger(["cf"]))
    with pytest.raises(ValueError, match="`every_n_steps=0` is no number of steps"):
        BackdoorEvaluationCallback(trainer, task, backdoored.trigger, every_n_steps=0)
    trainer.train()
    with pytest.raises(ValueError, match=r"has trained 1 steps.* before `train\(\)`"):
        BackdoorEvaluationCallback(trainer, task, backdoored.trigger)


def test_it_reaches_tensorboard(backdoored, task, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "runs"))
    trainer = make_trainer(backdoored, tmp_path, report_to="tensorboard", max_steps=2)
    trainer.add_callback(BackdoorEvaluationCallback(trainer, task, backdoored.trigger, every_n_steps=1))
    trainer.train()
    events = EventAccumulator(str(tmp_path / "runs"))
    events.Reload()
    assert [event.step for event in events.Scalars("eval/digits_asr")] == [0, 1, 2]
