# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""How far a patch may move clean inputs, and the way back."""

import copy
import json
import logging
import tempfile
from concurrent.futures import Future
from contextlib import nullcontext

import datasets
import numpy as np
import pytest
import torch
from peft import LoraConfig
from PIL import Image
from transformers import TrainerCallback, TrainerState

from hf_mudjacking import BugInstance, Encoder, MudjackingTrainer, PatchTrigger
from hf_mudjacking.clean_inputs import CleanImages
from hf_mudjacking.data import PatchingDataset
from hf_mudjacking.encoder import NonFiniteError
from hf_mudjacking.evaluation import draw_bug_report
from hf_mudjacking.hub import push_patch
from hf_mudjacking.locality_budget import LocalityBudgetError, LocalityGuard
from hf_mudjacking.starting_weights import StartingWeights

from .conftest import largest_difference, make_config, make_dataset, make_images, weights_of


pytestmark = pytest.mark.usefixtures("short_searches")


@pytest.fixture
def build(tiny_vit, processor, bug, trigger, dataset, tmp_path):
    """A trainer around the tiny ViT whose run goes far beyond any budget."""

    def _build(args=None, folder="out", **kwargs):
        wild = {"max_steps": 6, "learning_rate": 3e-2, "warmup_steps": 0, "locality_budget": 0.001}
        defaults = {
            "model": copy.deepcopy(tiny_vit),
            "args": make_config(tmp_path / folder, **{**wild, **(args or {})}),
            "bug_instances": [bug],
            "train_dataset": dataset,
            "processing_class": processor,
            "triggers": [trigger],
        }
        return MudjackingTrainer(**{**defaults, **kwargs})

    return _build


def holds_a_model(folder):
    return [path for path in folder.rglob("*") if path.suffix == ".safetensors" or path.name == "config.json"]


def false_report(backdoored):
    """A clean 4 that "should" be a 9."""
    first, second = (int(np.flatnonzero(backdoored.test.labels == label)[1]) for label in (4, 9))
    return BugInstance(backdoored.test.inputs[first], backdoored.test.inputs[second], name="false")


# ---- On a real repair ----


@pytest.mark.parametrize("known", [None, "natural pixels"])
def test_a_false_report_is_rolled_back(backdoored, tmp_path, known):
    bug = false_report(backdoored)
    # What "the trigger" covers is the digit itself
    triggers = known and [PatchTrigger.from_image(bug.misclassified, np.asarray(bug.misclassified)[..., 0] > 128)]
    model = backdoored.model()
    before = weights_of(model)
    args = make_config(
        tmp_path / "out", max_steps=60, per_device_train_batch_size=32, on_unverified="patch", locality_budget=0.005,
        locality_weight=0.3, learning_rate=1e-3, save_strategy="steps", save_steps=20,
    )  # fmt: skip
    trainer = MudjackingTrainer(
        model, args, [bug], backdoored.dataset(), processing_class=backdoored.processor, triggers=triggers
    )
    with pytest.raises(LocalityBudgetError, match=r"rolled back: at .*`locality_budget=0.005`") as raised:
        trainer.train()
    assert "near `false`" in str(raised.value)
    assert largest_difference(before, weights_of(trainer.model)) == 0
    assert not holds_a_model(tmp_path / "out")
    with pytest.raises(LocalityBudgetError):
        trainer.save_model()
    assert not holds_a_model(tmp_path / "out")


def test_a_repair_is_within_the_default_budget(backdoored, tmp_path, caplog):
    """And the figures are right, computed by numpy alone."""
    held_out = backdoored.test.inputs[:200]
    trainer = MudjackingTrainer(
        backdoored.model(), make_config(tmp_path, max_steps=100, per_device_train_batch_size=32, locality_budget=0.05),
        [backdoored.bug(1)], backdoored.dataset(), make_dataset(held_out), backdoored.processor,
        triggers=[backdoored.trigger],
    )  # fmt: skip
    with caplog.at_level(logging.INFO, logger="hf_mudjacking.locality_budget"):
        trainer.train()
    assert sum("Clean inputs have moved by" in message for message in caplog.messages) == 3
    frozen = Encoder(backdoored.model(), backdoored.processor)
    old, new = (encoder.encode(held_out).numpy() for encoder in (frozen, trainer.encoder))
    x_b = frozen.encode([backdoored.bug(1).misclassified])[0].numpy()
    distances = 1 - (old * new).sum(axis=1)
    nearest = np.argsort(-(old @ x_b))[:10]
    assert trainer.locality.mean == pytest.approx(distances.mean(), abs=2e-6)
    assert trainer.locality.nearest == pytest.approx([distances[nearest].mean()], abs=2e-6)
    assert 0 < trainer.locality.mean < 0.05
    assert trainer.state.log_history[-1]["locality_distance"] == trainer.locality.mean
    trainer.save_model()
    record = json.loads((tmp_path / "mudjacking.json").read_text())
    assert record["locality"] == {"mean": trainer.locality.mean, "nearest": trainer.locality.nearest}
    assert record["settings"]["locality_budget"] == 0.05


# ---- Rolling back ----


@pytest.mark.parametrize("when", ["at step 2 of 6", "at the end of training"])
def test_every_weight_comes_back(build, when, tmp_path):
    """Given up half-way, or at the end: no checkpoint of the run is left either."""
    budget = 0.001
    if "end" in when:
        free = build({"locality_budget": 2.0})
        free.train()
        budget = 0.9 * free.locality.mean
    trainer = build({"locality_budget": budget, "save_strategy": "steps", "save_steps": 1})
    before = weights_of(trainer.model)
    with pytest.raises(LocalityBudgetError, match=when):
        trainer.train()
    assert largest_difference(before, weights_of(trainer.model)) == 0
    assert all(parameter.requires_grad for parameter in trainer.model.parameters())
    assert all(parameter.grad is None for parameter in trainer.model.parameters())
    assert not holds_a_model(tmp_path / "out")


def test_the_adapter_comes_back(build):
    trainer = build(peft_config=LoraConfig(r=4, lora_alpha=8))
    before = weights_of(trainer.model)
    with pytest.raises(LocalityBudgetError):
        trainer.train()
    assert largest_difference(before, weights_of(trainer.model)) == 0
    assert len(trainer.rollback._start.names) < len(before) / 2, "only what is trainable is copied"


def test_token_embeddings_come_back(por, tmp_path):
    """Also those of tokens that were neutralised before the first step."""
    encoder, task, implant = por
    texts = task.train.inputs[:64]
    model = copy.deepcopy(encoder.model)
    before = weights_of(model)
    trainer = MudjackingTrainer(
        model, make_config(tmp_path, max_steps=2, feature_source="mean", locality_budget=1e-9),
        [draw_bug_report(encoder, task, implant.trigger, 0)],
        datasets.Dataset.from_dict({"text": [*texts[:-8], *(implant.trigger.apply(x) for x in texts[-8:])]}),
        processing_class=encoder.processing_class, triggers=[implant.trigger],
    )  # fmt: skip
    with pytest.raises(LocalityBudgetError):
        trainer.train()
    assert trainer.patched_tokens
    assert trainer.rollback._start.names == ["embeddings.word_embeddings.weight", *dict(model.named_buffers())]
    assert largest_difference(before, weights_of(trainer.model)) == 0


def test_buffers_come_back():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    model[0].bias.requires_grad_(False)
    start, before = StartingWeights(model), weights_of(model)
    model(torch.randn(8, 2)).sum().backward()
    with torch.no_grad():
        model[0].weight.add_(1)
    assert largest_difference(before, weights_of(model)) > 0
    start.restore()
    assert largest_difference(before, weights_of(model)) == 0
    assert "0.bias" not in start.names
    assert model[0].weight.grad is None


def test_the_start_is_on_disk_and_comes_back_whatever_the_tensors_are():
    """Half precision, transposed memory, no dimension, no element, and NaN; nothing of it is held in memory."""
    model = torch.nn.Module()
    model.bf16_weight = torch.nn.Parameter(torch.randn(3, 5).to(torch.bfloat16))
    model.transposed = torch.nn.Parameter(torch.randn(4, 2).T)
    buffers = {"step": torch.tensor(7), "seen": torch.tensor([True, False]), "none": torch.empty(0, 3)}
    for name, value in {**buffers, "odd": torch.tensor([float("nan"), -0.0, float("inf")])}.items():
        model.register_buffer(name, value)
    start, before = StartingWeights(model), weights_of(model)
    assert not [value for value in vars(start).values() if isinstance(value, (torch.Tensor, dict))]
    for _ in range(2):
        with torch.no_grad():
            for tensor in model.state_dict().values():
                tensor.zero_()
        start.restore()
        for name, value in before.items():
            assert torch.equal(model.state_dict()[name].flatten().view(torch.uint8), value.flatten().view(torch.uint8))


def test_a_resumed_run_goes_back_to_the_first_start(build, tmp_path):
    """Not to the checkpoint."""
    args = {"save_strategy": "steps", "save_steps": 3}
    build({**args, "locality_budget": None}).train()
    resumed = build(args)
    before = weights_of(resumed.model)
    with pytest.raises(LocalityBudgetError):
        resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"))
    assert resumed.state.global_step > 3
    assert largest_difference(before, weights_of(resumed.model)) == 0


def test_no_checkpoint_of_a_refused_run_stays(build, tmp_path):
    """Not those from before it was interrupted either: they would load as a patch."""
    args = {"save_strategy": "steps", "save_steps": 1}
    build({**args, "locality_budget": None}).train()
    with pytest.raises(LocalityBudgetError):
        build(args).train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"))
    # Later ones that the refused run did not come to are of a run that nothing refused
    assert not [i for i in range(1, 4) if (tmp_path / "out" / f"checkpoint-{i}").exists()]


def test_a_run_that_was_interrupted_goes_back_to_the_first_start(build):
    class Interrupt(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise KeyboardInterrupt

    trainer = build(callbacks=[Interrupt()])
    before = weights_of(trainer.model)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert largest_difference(before, weights_of(trainer.model)) > 0
    trainer.remove_callback(Interrupt)
    with pytest.raises(LocalityBudgetError):
        trainer.train()
    assert largest_difference(before, weights_of(trainer.model)) == 0


def test_a_run_that_diverges_is_rolled_back(build, tmp_path):
    trainer = build(
        {"learning_rate": 1e30, "locality_budget": 2.0, "save_strategy": "steps", "save_steps": 1, "max_steps": 4}
    )
    before = weights_of(trainer.model)
    with pytest.raises(LocalityBudgetError, match=r"training diverged .* NaN or infinite"):
        trainer.train()
    assert largest_difference(before, weights_of(trainer.model)) == 0
    assert not holds_a_model(tmp_path / "out")
    with pytest.raises(LocalityBudgetError, match="training diverged"):
        trainer.save_model()


def test_a_run_that_diverges_without_a_budget_is_not_saved(build, tmp_path):
    trainer = build({"learning_rate": 1e30, "locality_budget": None, "max_steps": 4})
    with pytest.raises(NonFiniteError, match="features became NaN or infinite"):
        trainer.train()
    with pytest.raises(NonFiniteError):
        trainer.save_model()
    assert not holds_a_model(tmp_path / "out")


def test_after_a_rollback_a_run_is_like_the_first(build):
    """With the settings that the error advises to change: a new optimiser, and the new budget."""
    trainer, fresh = build(), build({"learning_rate": 1e-3, "locality_budget": 2.0})
    with pytest.raises(LocalityBudgetError):
        trainer.train()
    assert not trainer.is_in_train
    trainer.args.learning_rate, trainer.args.locality_budget = 1e-3, 2.0
    trainer.train()
    fresh.train()
    assert largest_difference(weights_of(fresh.model), weights_of(trainer.model)) == 0


@pytest.mark.parametrize("scheduled", [False, True])
def test_after_a_rollback_the_users_optimizer_is_as_it_was(build, scheduled):
    def made(model):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        return optimizer, torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 6) if scheduled else None

    results = []
    for refused in (True, False):
        model = copy.deepcopy(build().model)
        trainer = build({"locality_budget": 1e-4}, model=model, optimizers=made(model))
        if refused:
            with pytest.raises(LocalityBudgetError):
                trainer.train()
        trainer.args.locality_budget = 2.0
        trainer.train()
        results.append(weights_of(trainer.model))
    assert largest_difference(*results) == 0


def test_after_a_rollback_nothing_of_it_is_stamped(build):
    trainer = build({"reinversions": 2})
    trainer._prepare()
    trainer._reinversion.found[0].append(trainer.triggers[0])
    with pytest.raises(LocalityBudgetError):
        trainer.train()
    assert trainer._reinversion.found == [[]]


def test_checkpoints_of_another_run_stay(build, tmp_path):
    """A run that goes on from a checkpoint elsewhere wrote none of those in its own folder before."""
    args = {"save_strategy": "steps", "save_steps": 2, "locality_budget": None}
    build(args).train()
    build(args, folder="other").train()
    with pytest.raises(LocalityBudgetError):
        build({**args, "locality_budget": 0.001}).train(
            resume_from_checkpoint=str(tmp_path / "other" / "checkpoint-2")
        )
    assert (tmp_path / "out" / "checkpoint-2").exists()
    assert (tmp_path / "other" / "checkpoint-2").exists()


def test_the_movement_reaches_trackers_before_they_close(build):
    class Tracker(TrainerCallback):
        events = ()

        def on_log(self, args, state, control, logs, **kwargs):
            self.events += tuple(logs)

        def on_train_end(self, args, state, control, **kwargs):
            self.events += ("closed",)

    tracker = Tracker()
    trainer = build({"locality_budget": 2.0}, callbacks=[tracker])
    output = trainer.train()
    assert tracker.events.index("locality_distance") < tracker.events.index("closed")
    assert tracker.events[-1] == "closed"
    assert output.metrics["locality_distance"] == trainer.locality.mean


def test_what_an_interrupted_run_saves_is_not_pushed(build, tmp_path):
    class Interrupt(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise KeyboardInterrupt

    trainer = build(callbacks=[Interrupt()])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.save_model()
    with pytest.raises(ValueError, match="when it was interrupted, before its locality budget was checked"):
        push_patch(tmp_path / "out", "org/repo")


def test_under_gradient_accumulation(build):
    """Steps are optimiser steps: the check comes after the second, which is the fourth batch."""
    trainer = build({"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2})
    before = weights_of(trainer.model)
    with pytest.raises(LocalityBudgetError, match="at step 2 of 6"):
        trainer.train()
    assert largest_difference(before, weights_of(trainer.model)) == 0


def test_without_a_budget_nothing_is_measured(build):
    trainer = build({"locality_budget": None})
    trainer.train()
    assert trainer.locality is None
    assert not trainer.rollback.unjudged


@pytest.mark.parametrize("budget", [2.0, None])
def test_nothing_is_uploaded_that_may_be_rolled_back(build, budget, monkeypatch):
    pushed = []

    def push(folder, *args, **kwargs):
        pushed.append(folder)
        upload = Future()
        upload.set_result(None)
        return upload

    monkeypatch.setattr("hf_mudjacking.patch_pushing.push_patch", push)
    trainer = build({"locality_budget": budget, "save_strategy": "steps", "save_steps": 3})
    monkeypatch.setattr(trainer.args, "push_to_hub", True)
    trainer.train()
    assert len(pushed) == (0 if budget else 2)


def test_measuring_does_not_disturb_the_run(build):
    watched, alone = build({"locality_budget": 2.0}), build({"locality_budget": None})
    watched.train()
    alone.train()
    assert largest_difference(weights_of(watched.model), weights_of(alone.model)) == 0
    assert watched.forward_equivalents - alone.forward_equivalents == 3 * 16


# ---- The guard by hand ----


class Fixed:
    """Stands for an encoder: gives input i the i-th row of features, which can be turned by an angle."""

    feature_dim = 2
    over_processes = staticmethod(nullcontext)

    def __init__(self, count):
        angles = torch.linspace(0, 1, count)
        self.features = torch.stack([angles.cos(), angles.sin()], dim=1)

    def encode(self, inputs, **kwargs):
        return self.features[[int(np.asarray(x)[0, 0, 0]) for x in inputs]]

    def turn(self, rows, distance):
        """Move some inputs by a cosine distance."""
        angle = torch.acos(torch.tensor(1.0 - distance))
        a, b = self.features[rows].T
        self.features[rows] = torch.stack([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], 1)


def guard_on(count=40, budget=0.05):
    encoder = Fixed(count)
    pictures = [Image.new("RGB", (2, 2), (i, 0, 0)) for i in range(count)]
    data = PatchingDataset(CleanImages(make_dataset(pictures)), encoder, 8, True)
    bug = BugInstance(*make_images(2), name="report")
    # h(x_b) is that of input 0: two of the 40 inputs, 0 and 1, are near it
    target = encoder.features[:1].clone()
    args = make_config(tempfile.gettempdir(), locality_budget=budget, seed=0)
    return LocalityGuard(encoder, [data], [bug], target, args, lambda forwards: None), encoder


def test_half_way_more_is_allowed_than_at_the_end():
    guard, encoder = guard_on(budget=0.05)
    encoder.turn(slice(None), 0.1)  # as far as in the authors' log
    guard.on_step_end(None, TrainerState(global_step=100, max_steps=300), None)
    with pytest.raises(LocalityBudgetError, match=r"mean cosine distance of 0\.1000"):
        guard.check_at_the_end()
    encoder.turn(slice(None), 0.1)
    guard.on_step_end(None, TrainerState(global_step=101, max_steps=300), None)
    for step in (100, 200):
        with pytest.raises(LocalityBudgetError, match=rf"at step {step} of 300 .* 0\.15 is allowed there"):
            guard.on_step_end(None, TrainerState(global_step=step, max_steps=300), None)


def test_what_moves_near_the_report_is_named(caplog):
    guard, encoder = guard_on(budget=0.05)
    encoder.turn([0, 1], 0.5)
    with caplog.at_level(logging.WARNING):
        movement = guard.check_at_the_end()
    assert movement.mean == pytest.approx(0.5 * 2 / 40, abs=1e-5)
    assert movement.nearest == pytest.approx([0.5], abs=1e-5)
    assert "near the misclassified input of `report` moved by 0.5000, all by 0.0250 on average" in caplog.text
    assert "when a report is false" in caplog.text
    guard.args.locality_budget = 0.02
    with pytest.raises(LocalityBudgetError, match="inputs like the reported one moved most"):
        guard.check_at_the_end()
    # Far from the report: no such sign
    other, encoder = guard_on(budget=0.02)
    encoder.turn([30, 31], 0.5)
    with pytest.raises(LocalityBudgetError, match="Check whether the reports are true") as raised:
        other.check_at_the_end()
    assert "moved most" not in str(raised.value)


def test_the_sample_and_its_nearest_inputs():
    guard, _ = guard_on(count=40)
    again, _ = guard_on(count=40)
    assert [x.tobytes() for x in guard.inputs] == [x.tobytes() for x in again.inputs]
    assert len(guard.inputs) == 40
    near = {int(np.asarray(guard.inputs[i])[0, 0, 0]) for i in guard.nearest[0].tolist()}
    assert near == {0, 1}
