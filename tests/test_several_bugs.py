# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""Several reports in one run, one patch after another, and reports without a trigger."""

import copy
import dataclasses
import json
import logging
import shutil

import datasets
import numpy as np
import pytest
import torch
from peft import LoraConfig
from torch.nn.functional import interpolate
from transformers import AutoModel

from hf_mudjacking import BugInstance, Encoder, MudjackingTrainer, PatchTrigger, TextTrigger, load_trigger, pre_step
from hf_mudjacking.attacks import implant_bad_encoder
from hf_mudjacking.evaluation.classifiers import train_classifier
from hf_mudjacking.evaluation.repair import measured_repair
from hf_mudjacking.evaluation.report import report_lines
from hf_mudjacking.evaluation.tasks import DownstreamTask
from hf_mudjacking.inversion import UnverifiedTriggerError
from hf_mudjacking.remembered import RememberedTrigger, load_remembered, report_earlier_repairs, what_they_do
from hf_mudjacking.reports import invert_reports
from hf_mudjacking.same_trigger import same_triggers
from hf_mudjacking.triggers import WarpTrigger, noise_blend, square_patch
from hf_mudjacking.triggers.warp import random_warp

from .conftest import Backdoored, largest_difference, make_config, make_images, weights_of


pytestmark = pytest.mark.usefixtures("short_searches")

SECOND = square_patch((16, 16), 4, margin=12, color=(255, 0, 0))
SECOND_TARGET = 7


@pytest.fixture(scope="module")
def twice(backdoored: Backdoored):
    """The digits ViT with a second backdoor beside the first, and its client's classifier."""
    reference = backdoored.train.inputs[int(np.flatnonzero(backdoored.train.labels == SECOND_TARGET)[0])]
    implant = implant_bad_encoder(
        backdoored.implant.model, backdoored.processor, backdoored.train.inputs, SECOND, reference, backdoored.test,
        steps=150, disable_tqdm=True,
    )  # fmt: skip
    features = Encoder(copy.deepcopy(implant.model), backdoored.processor).encode(backdoored.train.inputs)
    return implant.model, train_classifier(features, backdoored.train.labels)


def success(backdoored, model, kept, trigger, target):
    """ASR, by numpy alone."""
    others = [x for x, y in zip(backdoored.test.inputs, backdoored.test.labels, strict=True) if y != target]
    stamped = Encoder(model, backdoored.processor).encode([trigger.apply(x) for x in others])
    return float((kept.predict(stamped.numpy()) == target).mean())


def report(backdoored, trigger, target, seed):
    """A random report of a trigger."""
    rng = np.random.default_rng(seed)
    labels = backdoored.test.labels
    i = rng.choice(np.flatnonzero(labels != target))
    j = rng.choice([k for k in np.flatnonzero(labels == labels[i]) if k != i])
    return BugInstance(trigger.apply(backdoored.test.inputs[i]), backdoored.test.inputs[j], name=f"bug-{seed}")


@pytest.fixture
def build(tiny_vit, processor, bug, trigger, dataset, tmp_path):
    """A trainer around the tiny ViT with a known trigger."""

    def _build(output_dir=None, args=None, **kwargs):
        defaults = {
            "model": copy.deepcopy(tiny_vit),
            "args": make_config(output_dir or tmp_path / "out", **{"max_steps": 4, **(args or {})}),
            "bug_instances": [bug],
            "train_dataset": dataset,
            "processing_class": processor,
            "triggers": [trigger],
        }
        return MudjackingTrainer(**{**defaults, **kwargs})

    return _build


# ---- Which triggers are the same ----


def test_the_same_trigger_in_two_reports_is_one(backdoored, tmp_path):
    """Found twice, in two inputs."""
    trainer = MudjackingTrainer(
        backdoored.model(), make_config(tmp_path, max_steps=1), [backdoored.bug(1), backdoored.bug(4)],
        backdoored.dataset(200), processing_class=backdoored.processor,
    )  # fmt: skip
    trainer._prepare()
    assert len(trainer.triggers) == 2
    assert sorted(map(sorted, trainer.trigger_groups)) == [[0, 1]]
    assert trainer.data_collator.stamps == [[trainer.triggers[trainer.trigger_groups[0][0]]]]
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(3)])
    assert len(batch["pixel_values"]) == 2 * 3 + 3 * 2


def test_what_is_the_same_and_what_is_not(backdoored, twice):
    first, inputs = backdoored.trigger, backdoored.test.inputs[:16]
    encoder = Encoder(backdoored.model(), backdoored.processor)
    more = with_margin(first, inputs[3])
    assert sorted(same_triggers(encoder, [more, first, None, more], inputs)[0]) == [0, 1, 3]
    # A part that hardly fires is alike, but does not do what the whole does
    mask = first.mask.copy()
    mask[12, 12:] = False
    assert same_triggers(encoder, [first, PatchTrigger(mask, first.pattern)], inputs) == [[0], [1]]
    # Two backdoors
    assert same_triggers(Encoder(twice[0], backdoored.processor), [first, SECOND], inputs) == [[0], [1]]
    # One effect, two triggers: clean inputs end at the same place, through pixels that have nothing in common
    copied = PatchTrigger.from_image(first.apply(inputs[0]), np.ones((16, 16), dtype=bool))
    assert same_triggers(encoder, [first, copied], inputs) == [[0], [1]]
    # One place, two patterns; another kind; a patch of the same looks that goes anywhere
    black = PatchTrigger(first.mask, 255 - first.pattern)
    anywhere = PatchTrigger(first.mask, first.pattern, placement="anywhere")
    others = [first, black, noise_blend((16, 16)), anywhere]
    assert same_triggers(encoder, others, inputs) == [[0], [1], [2], [3]]
    assert same_triggers(encoder, [None, None], inputs) == []
    # Warps with other control points
    warp = random_warp(4, 2.0, 16)
    finer = WarpTrigger(
        interpolate(torch.as_tensor(warp.flow)[None], (8, 8), mode="bicubic", align_corners=True)[0].numpy()
    )
    assert same_triggers(encoder, [warp, finer, random_warp(8, 2.0, 16, seed=1)], inputs) in (
        [[0, 1], [2]],
        [[1, 0], [2]],
    )


def with_margin(trigger, x):
    """The trigger as an inversion finds it that takes in a row of the picture above it."""
    mask = trigger.mask.copy()
    mask[11, 12:] = True
    return PatchTrigger.from_image(trigger.apply(x), mask)


def test_the_strongest_of_a_group_comes_first(backdoored):
    encoder, inputs = Encoder(backdoored.model(), backdoored.processor), backdoored.test.inputs[:16]
    triggers = [with_margin(backdoored.trigger, inputs[3]), backdoored.trigger]
    clean = encoder.encode(inputs)
    moved = [float(1 - (encoder.encode([t.apply(x) for x in inputs]) * clean).sum(1).mean()) for t in triggers]
    assert moved[0] < moved[1]
    assert same_triggers(encoder, triggers, inputs) == [[1, 0]]


def test_words_that_are_the_same(por):
    encoder, task, implant = por
    inputs, word = task.train.inputs[:16], implant.trigger.words[0]
    triggers = [TextTrigger(word), TextTrigger(word), TextTrigger("the"), TextTrigger([word, "bb"])]
    assert same_triggers(encoder, triggers, inputs) == [[0, 1], [2], [3]]


def test_two_triggers_stay_two_and_both_are_repaired(backdoored, twice, tmp_path):
    model, kept = twice
    model = copy.deepcopy(model)
    both = [(backdoored.trigger, backdoored.target), (SECOND, SECOND_TARGET)]
    assert min(success(backdoored, model, kept, *one) for one in both) > 0.9
    trainer = MudjackingTrainer(
        model, make_config(tmp_path, max_steps=120, per_device_train_batch_size=32),
        [report(backdoored, *one, seed=i) for i, one in enumerate(both)],
        backdoored.dataset(), processing_class=backdoored.processor,
    )  # fmt: skip
    trainer.train()
    assert trainer.trigger_groups == [[0], [1]]
    assert max(success(backdoored, trainer.model, kept, *one) for one in both) < 0.05


# ---- One patch after another ----


@pytest.fixture(scope="module")
def first_patch(backdoored, twice, tmp_path_factory):
    """The model with two backdoors, repaired of the first, on disk."""
    out = tmp_path_factory.mktemp("first")
    trainer = MudjackingTrainer(
        copy.deepcopy(twice[0]), make_config(out, max_steps=80, per_device_train_batch_size=32),
        [report(backdoored, backdoored.trigger, backdoored.target, seed=0)],
        backdoored.dataset(), processing_class=backdoored.processor, triggers=[backdoored.trigger],
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    return out


def second_patch(backdoored, first_patch, out, **args):
    trainer = MudjackingTrainer(
        str(first_patch), make_config(out, **{"max_steps": 80, "per_device_train_batch_size": 32, **args}),
        [report(backdoored, SECOND, SECOND_TARGET, seed=1)], backdoored.dataset(), triggers=[SECOND],
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    return trainer


def test_a_second_patch_keeps_the_first(backdoored, twice, first_patch, tmp_path):
    trainer = second_patch(backdoored, first_patch, tmp_path / "second")
    assert success(backdoored, trainer.model, twice[1], backdoored.trigger, backdoored.target) < 0.05
    assert success(backdoored, trainer.model, twice[1], SECOND, SECOND_TARGET) < 0.05
    assert [stamp.mask.tolist() for stamp, *_ in trainer.data_collator.stamps] == [
        SECOND.mask.tolist(),
        backdoored.trigger.mask.tolist(),
    ]
    # A second run that does not know of the first trigger lets it do several times as much
    forgetful = second_patch(backdoored, first_patch, tmp_path / "forgetful", remember_triggers=False)
    known = [RememberedTrigger(backdoored.trigger)]
    kept, lost = (1 - what_they_do(t.encoder, known, backdoored.test.inputs[:64])[0] for t in (trainer, forgetful))
    assert kept < 0.5 * lost
    # By hand: what the first trigger still does, before and after
    inputs = trainer._inputs["train_dataset"].sample(64, trainer.args.seed)
    (recorded,) = json.loads((tmp_path / "second" / "mudjacking.json").read_text())["remembered"]
    for model, name in ((str(first_patch), "cosine_before"), (str(tmp_path / "second"), "cosine_after")):
        encoder = Encoder(AutoModel.from_pretrained(model), backdoored.processor)
        clean, stamped = encoder.encode(inputs), encoder.encode([backdoored.trigger.apply(x) for x in inputs])
        assert recorded[name] == pytest.approx(float((clean * stamped).sum(1).mean()), abs=1e-3)
    assert recorded["kind"] == "patch"
    assert recorded["cosine_after"] > 0.95


def test_a_third_round_knows_both(backdoored, first_patch, tmp_path):
    second_patch(backdoored, first_patch, tmp_path / "second", max_steps=1)
    third = second_patch(backdoored, tmp_path / "second", tmp_path / "third", max_steps=1)
    masks = [earlier.trigger.mask.tolist() for earlier in third.remembered]
    assert masks == [backdoored.trigger.mask.tolist(), SECOND.mask.tolist()]
    names = sorted(path.name for path in (tmp_path / "third" / "_triggers").iterdir())
    assert names == ["0", "remembered-0", "remembered-1"]
    forgetful = second_patch(backdoored, tmp_path / "second", tmp_path / "f", max_steps=1, remember_triggers=False)
    assert forgetful.remembered == []
    assert len(forgetful.data_collator.stamps) == 1
    assert json.loads((tmp_path / "f" / "mudjacking.json").read_text())["remembered"] == []


def test_remembered_triggers_survive_a_resume(build, bug, tmp_path):
    build(tmp_path / "first").save_model()
    args = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "learning_rate": 1e-3}
    other = square_patch((16, 16), 3, margin=9, color=(0, 0, 255))

    def again(**kwargs):
        return build(tmp_path / "second", args, model=str(tmp_path / "first"), processing_class=None, **kwargs)

    whole = again(triggers=[other])
    whole.train()
    # The folder of the first patch no longer has them; the checkpoint does.
    shutil.rmtree(tmp_path / "first" / "_triggers")
    resumed = again(triggers=None)
    assert resumed.remembered == []
    resumed.train(resume_from_checkpoint=str(tmp_path / "second" / "checkpoint-3"))
    assert np.array_equal(resumed.remembered[0].trigger.mask, whole.remembered[0].trigger.mask)
    assert np.array_equal(resumed.triggers[0].mask, other.mask)
    assert resumed.remembered[0].cosine_after == whole.remembered[0].cosine_after
    assert largest_difference(weights_of(whole.model), weights_of(resumed.model)) <= 1e-6


def test_an_adapter_on_a_patched_model_remembers(build, trigger, tmp_path):
    build(tmp_path / "first").save_model()
    second = build(
        tmp_path / "second", model=str(tmp_path / "first"), processing_class=None,
        peft_config=LoraConfig(r=2, lora_alpha=4), triggers=[square_patch((16, 16), 3, margin=9)],
    )  # fmt: skip
    second.train()
    second.save_model()
    assert (tmp_path / "second" / "adapter_model.safetensors").exists()
    saved = load_trigger(tmp_path / "second" / "_triggers" / "remembered-0")
    assert np.array_equal(saved.mask, trigger.mask)


def test_folders_of_earlier_versions_and_of_the_hub(build, trigger, tmp_path, caplog):
    out = tmp_path / "out"
    trainer = build(bug_instances=trainer_bugs(3), triggers=[trigger, trigger, square_patch((16, 16), 3, margin=9)])
    trainer.train()
    trainer.save_model()
    assert len(load_remembered(out)) == 2, "two of the three reports share a trigger"
    record = json.loads((out / "mudjacking.json").read_text())
    for key in ("trigger_groups", "remembered", "skipped", "locality"):
        del record[key]
    (out / "mudjacking.json").write_text(json.dumps(record))
    assert len(load_remembered(out)) == 3
    shutil.rmtree(out / "_triggers")
    with caplog.at_level(logging.WARNING):
        assert load_remembered(out) == []
    assert "repaired of 3 triggers, but 3 are not in `_triggers/`" in caplog.text
    assert load_remembered(tmp_path) == []


def trainer_bugs(count):
    pictures = make_images(2 * count, seed=8)
    return [BugInstance(a, b, name=f"r{i}") for i, (a, b) in enumerate(zip(*[iter(pictures)] * 2, strict=True))]


def test_an_earlier_repair_that_got_worse_is_a_warning(trigger, caplog):
    with caplog.at_level(logging.WARNING):
        report_earlier_repairs([RememberedTrigger(trigger, 0.99, 0.975), RememberedTrigger(trigger)])
        assert not caplog.records
        report_earlier_repairs([RememberedTrigger(trigger, 0.99, 0.96)])
    assert "0.990 before this run, 0.960 after it. This run undid a part of that repair" in caplog.text


# ---- Triggers of one class ----


@pytest.fixture
def of_one_class(monkeypatch):
    """Every trigger that is inverted counts as one that works on inputs like x_r alone."""

    def inverted(*args):
        found = invert_reports(*args)
        for screening in found.screenings:
            # Frozen, as those in `found.kept`, which are the same
            object.__setattr__(screening, "found", dataclasses.replace(screening.found, one_class=True))
        return found

    monkeypatch.setattr(pre_step, "invert_reports", inverted)


def report_trainer(backdoored, out, **args):
    return MudjackingTrainer(
        backdoored.model(), make_config(out, **{"max_steps": 8, "learning_rate": 1e-3, **args}), [backdoored.bug(1)],
        backdoored.dataset(64), processing_class=backdoored.processor,
    )  # fmt: skip


def test_inputs_like_the_reference_come_more_often(backdoored, of_one_class, tmp_path):
    trainer = report_trainer(backdoored, tmp_path)
    trainer._prepare()
    features = trainer.train_dataset.frozen_features
    nearest = (features @ trainer.encoder.encode([trainer.bug_instances[0].reference])[0]).argsort(descending=True)
    rows = [trainer.train_dataset[i] for i in range(len(trainer.train_dataset))]
    counts = np.bincount([row["index"] for row in rows])
    # Ten times three, and up to a whole step
    assert counts.sum() == 64 + 32
    assert counts[nearest[:3]].tolist() == [12, 12, 11]
    assert np.delete(counts, nearest[:3].tolist()).tolist() == [1] * 61
    assert all(torch.equal(row["frozen_features"], features[row["index"]]) for row in rows)
    for row in rows[64:]:
        assert np.array_equal(np.asarray(row["input"]), np.asarray(trainer._inputs["train_dataset"][row["index"]]))


def test_a_trigger_of_all_classes_changes_no_row(backdoored, tmp_path):
    trainer = report_trainer(backdoored, tmp_path)
    trainer._prepare()
    assert len(trainer.train_dataset) == 64


def test_a_resumed_run_leans_as_before(backdoored, of_one_class, tmp_path):
    saves = {"save_strategy": "steps", "save_steps": 4}
    whole = report_trainer(backdoored, tmp_path, **saves)
    whole.train()
    resumed = report_trainer(backdoored, tmp_path, **saves)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert resumed.inversions == []
    assert len(resumed.train_dataset) == 96
    assert largest_difference(weights_of(whole.model), weights_of(resumed.model)) <= 1e-6


# ---- Reports without a trigger ----


def natural(backdoored, name="natural"):
    """Two clean digits of two classes: there is no trigger in it."""
    first, second = (int(np.flatnonzero(backdoored.test.labels == label)[0]) for label in (3, 5))
    return BugInstance(backdoored.test.inputs[first], backdoored.test.inputs[second], name=name)


def mixed(backdoored, out, reports=None, **args):
    """A report with a trigger behind one without."""
    return MudjackingTrainer(
        backdoored.model(), make_config(out, **{"max_steps": 4, **args}),
        reports or [natural(backdoored), backdoored.bug(1)], backdoored.dataset(200),
        processing_class=backdoored.processor,
    )  # fmt: skip


def test_refuse_is_the_default(backdoored, tmp_path):
    trainer = mixed(backdoored, tmp_path)
    with pytest.raises(UnverifiedTriggerError, match="No localised trigger was verified in bug instance `natural`"):
        trainer.train()
    assert len(trainer.bug_instances) == 2
    assert largest_difference(weights_of(trainer.model), weights_of(backdoored.implant.model)) == 0
    assert not list(tmp_path.rglob("*.safetensors"))


def test_skip_leaves_the_report_out(backdoored, tmp_path, caplog):
    args = {"on_unverified": "skip", "save_strategy": "steps", "save_steps": 2}
    trainer = mixed(backdoored, tmp_path, **args)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert "bug instance `natural`" in caplog.text
    assert "It is left out." in caplog.text
    assert [bug.name for bug in trainer.bug_instances] == ["report-1"]
    assert len(trainer.triggers) == len(trainer.inversions) == len(trainer.evidence) == 1
    alone = mixed(backdoored, tmp_path / "alone", [backdoored.bug(1)])
    alone.train()
    assert largest_difference(weights_of(trainer.model), weights_of(alone.model)) == 0
    resumed = mixed(backdoored, tmp_path, **args)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.inversions == []
    assert [bug.name for bug in resumed.bug_instances] == ["report-1"]
    assert largest_difference(weights_of(trainer.model), weights_of(resumed.model)) <= 1e-6
    nothing_left = mixed(backdoored, tmp_path / "none", [natural(backdoored)], on_unverified="skip")
    with pytest.raises(UnverifiedTriggerError, match=r"`natural`.* No report is left"):
        nothing_left.train()


def test_patch_repairs_it_without_a_trigger(backdoored, tmp_path, caplog):
    args = {"on_unverified": "patch", "max_steps": 20, "save_strategy": "steps", "save_steps": 10}
    trainer = mixed(backdoored, tmp_path, learning_rate=1e-3, **args)
    false = trainer.bug_instances[0]

    def cosine():
        x_b, x_r = trainer.encoder.encode([false.misclassified, false.reference])
        return float(x_b @ x_r)

    before = cosine()
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert "It is repaired without a trigger." in caplog.text
    assert cosine() > before + 0.3
    assert trainer.triggers[0] is None
    assert trainer.trigger_groups == [[1]]
    assert len(trainer.inversions) == 2
    trainer.save_model()
    assert sorted(path.name for path in (tmp_path / "_triggers").iterdir()) == ["1"]
    record = json.loads((tmp_path / "mudjacking.json").read_text())
    assert record["triggers"] == [None, trainer.triggers[1].summary()]
    assert record["evidence"][0] < 0.5 < record["evidence"][1]
    assert len(load_remembered(tmp_path)) == 1
    resumed = mixed(backdoored, tmp_path, learning_rate=1e-3, **args)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
    assert resumed.triggers[0] is None
    assert largest_difference(weights_of(trainer.model), weights_of(resumed.model)) <= 1e-6


def test_nothing_of_it_is_in_the_generalizability_term(backdoored, tmp_path):
    """Of no report a trigger is known: x ⊕ e is x, and the term is the locality loss once more."""
    trainer = mixed(backdoored, tmp_path, [natural(backdoored)], on_unverified="patch", max_steps=3)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [log["cosine_generalizability"] for log in logs] == pytest.approx([1] * 3, abs=1e-6)
    for log in logs:
        assert log["loss_generalizability"] == pytest.approx(log["loss_locality"], abs=1e-6)
    assert trainer.data_collator.stamps == []
    # All rows carry the trigger that is known
    both = mixed(backdoored, tmp_path / "both", on_unverified="patch")
    both._prepare()
    rows = [both.train_dataset[i] for i in range(4)]
    pixels = both.data_collator(rows)["pixel_values"]
    expected = [both.triggers[1].apply(row["input"]) for row in rows]
    assert torch.equal(pixels[4:8], both.encoder.preprocess(expected)["pixel_values"])
    x_r = both.bug_instances[0].reference
    assert torch.equal(pixels[12], both.encoder.preprocess([x_r])["pixel_values"][0])


def test_a_report_without_a_trigger_is_measured(backdoored, tmp_path):
    """With its best candidate, for want of a trigger."""
    task = DownstreamTask(backdoored.train.select(range(200)), backdoored.test.select(range(200)))
    trainer = mixed(backdoored, tmp_path, [natural(backdoored)], on_unverified="patch", max_steps=1)
    report = measured_repair(trainer, task, classifiers=("logistic",)).report
    assert report["settings"]["trigger_measured"] == "unverified"
    assert report["triggers"][0]["kind"] is None
    measured = "unverified, not stamped in training; ASR and RA are measured with the best candidate"
    assert any(measured in line for line in report_lines(report))
    assert report["cost"]["seconds"] > trainer.inversion_seconds > 0
    # Not where it is the second report, or the attacker's own trigger is known
    known = {"true_trigger": backdoored.trigger, "classifiers": ("logistic",)}
    for bugs, settings in (
        ([backdoored.bug(), natural(backdoored)], {"classifiers": ("logistic",)}),
        ([natural(backdoored)], known),
    ):
        trainer = mixed(backdoored, tmp_path / str(len(bugs)), bugs, on_unverified="patch", max_steps=1)
        report = measured_repair(trainer, task, **settings).report
        assert report["triggers"][-1]["description"] == "unverified, not stamped in training"


def test_text_without_a_trigger_is_patched_in_all_weights(por, tmp_path):
    encoder, task, _ = por
    x_b, x_r = task.train.inputs[0], task.train.inputs[1]
    texts = datasets.Dataset.from_dict({"text": task.train.inputs[:64]})
    trainer = MudjackingTrainer(
        copy.deepcopy(encoder.model), make_config(tmp_path, max_steps=1, on_unverified="patch", feature_source="mean",
        min_evidence=1.0), [BugInstance(x_b, x_r)], texts, processing_class=encoder.processing_class,
    )  # fmt: skip
    trainer.train()
    assert trainer.triggers == [None]
    assert trainer.patched_tokens == []
