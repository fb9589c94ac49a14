# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""Verdicts on true, mistaken and made-up reports, before any weight changes."""

import copy
import dataclasses
import json

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from peft import LoraConfig, get_peft_model
from PIL import Image
from sklearn.metrics import roc_auc_score
from transformers import ResNetConfig, ResNetModel

from hf_mudjacking import BugInstance, Encoder, InvertedTrigger, MudjackingTrainer, PatchTrigger, screen_report
from hf_mudjacking import screening as screening_module
from hf_mudjacking.cli import main
from hf_mudjacking.cli.inspect import _file_names
from hf_mudjacking.evaluation import draw_bug_report
from hf_mudjacking.evaluation.classifiers import train_classifier
from hf_mudjacking.evaluation.figures import plot_inspection, plot_repair, trigger_picture
from hf_mudjacking.inversion import UnverifiedTriggerError, image, invert_trigger
from hf_mudjacking.inversion.filling import filled_in
from hf_mudjacking.inversion.hold import can_hold, doubt_left, hold, least_hold, worth_of_hold
from hf_mudjacking.inversion.image import small_patch_in_reference
from hf_mudjacking.inversion.verification import TransferMeter
from hf_mudjacking.modes import freeze_norms
from hf_mudjacking.screening import Screening, judge, transfer_by_size, without_trigger
from hf_mudjacking.triggers import AdditiveTrigger, BlendTrigger, noise_blend, random_warp, square_patch

from .conftest import largest_difference, make_config, make_images, weights_of


@pytest.fixture(scope="module")
def validation(backdoored):
    return backdoored.train.inputs[:32]


@pytest.fixture(scope="module")
def attacked(backdoored):
    return Encoder(backdoored.model(), backdoored.processor)


def of_class(backdoored, label, rank):
    return backdoored.test.inputs[int(np.flatnonzero(backdoored.test.labels == label)[rank])]


def natural_reports(backdoored, encoder, count):
    """Test inputs that a classifier on a never-attacked encoder gets wrong, each with a right one of its class."""
    classifier = train_classifier(encoder.encode(backdoored.train.inputs), backdoored.train.labels)
    truth, inputs = backdoored.test.labels, backdoored.test.inputs
    right = classifier.predict(encoder.encode(inputs).numpy()) == truth
    return [
        BugInstance(inputs[i], inputs[int(np.flatnonzero(right & (truth == truth[i]))[0])], name=f"natural-{i}")
        for i in np.flatnonzero(~right)[:count]
    ]


def mislabelled(backdoored, seed):
    """A triggered input, and one of another class than its own or the target's."""
    rng = np.random.default_rng(seed)
    own, other = rng.choice(np.arange(1, 10), 2, replace=False)
    return BugInstance(
        backdoored.trigger.apply(of_class(backdoored, own, seed)),
        of_class(backdoored, other, seed),
        name=f"wrong-{seed}",
    )


@pytest.fixture(scope="module")
def true(backdoored, attacked, validation):
    return [screen_report(attacked, backdoored.bug(seed), validation) for seed in range(12)]


@pytest.fixture(scope="module")
def natural(backdoored, validation):
    encoder = Encoder(copy.deepcopy(backdoored.clean_model), backdoored.processor)
    return [screen_report(encoder, bug, validation) for bug in natural_reports(backdoored, encoder, 8)]


@pytest.fixture(scope="module")
def wrong(backdoored, attacked, validation):
    return [screen_report(attacked, mislabelled(backdoored, seed), validation) for seed in range(10)]


# ---- Verdicts ----


def test_true_reports_are_believed(true):
    verdicts = [screening.verdict for screening in true]
    assert verdicts.count("trigger") >= 11
    # One pair of a class is no more alike than this, also before it is stamped
    assert all(0.7 <= s.believed <= 1 for s in true if s.verdict == "trigger")


def test_natural_misclassifications(natural):
    assert len(natural) == 8
    verdicts = [screening.verdict for screening in natural]
    assert verdicts.count("natural") >= 0.75 * len(verdicts)
    assert "trigger" not in verdicts


def test_references_of_another_class(wrong, true):
    """Two digits of different classes may look alike, and that of one class may not: most are believed, yet less."""
    assert sum(screening.verdict != "trigger" for screening in wrong) >= 0.4 * len(wrong)
    assert np.median([s.believed for s in wrong]) < 0.8 * np.median([s.believed for s in true])


def test_belief_separates_them(true, natural, wrong):
    for false, least in ((natural, 0.97), (wrong, 0.85), ([*natural, *wrong[:5]], 0.94)):
        scores = [screening.believed for screening in [*true, *false]]
        assert roc_auc_score([1] * len(true) + [0] * len(false), scores) >= least


def test_a_trigger_of_another_model(backdoored, attacked, validation):
    """It does no more here than any noise: the reports are of inputs that are got wrong with it, as some are without."""
    foreign = PatchTrigger.from_image(make_images(1, seed=3)[0], np.pad(np.ones((4, 4), bool), ((12, 0), (0, 12))))
    inputs, truth = backdoored.test.inputs, backdoored.test.labels
    stamped = [foreign.apply(x) for x in inputs]
    clean, changed = (backdoored.kept.predict(attacked.encode(part).numpy()) == truth for part in (inputs, stamped))
    verdicts = []
    for i in np.flatnonzero(~changed)[:3]:
        same = np.flatnonzero(clean & (truth == truth[i]) & (np.arange(len(truth)) != i))
        verdicts.append(screen_report(attacked, BugInstance(stamped[i], inputs[same[0]]), validation))
    assert len(verdicts) == 3
    assert "trigger" not in [screening.verdict for screening in verdicts], [s.evidence for s in verdicts]


def test_a_reference_with_the_trigger(backdoored, attacked, validation):
    """Nearly the same feature: nothing to repair. Half-way there: evidence of a wrong pair."""
    bug = backdoored.bug(0)
    same = BugInstance(bug.misclassified, backdoored.trigger.apply(bug.reference))
    with pytest.raises(ValueError, match="Nothing to patch"):
        screen_report(attacked, same, validation)
    found = invert_trigger(attacked, bug, validation)
    screening = judge(attacked, same, found, validation, 0.5)
    assert screening.verdict == "wrong pair"
    assert screening.evidence["reference_arrived"] > 0.9
    assert screening.believed < 0.3
    assert any("x_r lies" in reason for reason in screening.reasons)


def test_a_signal_that_undoes_nothing_says_nothing_about_the_pair(backdoored, attacked, validation):
    """x_b less a signal that is not its trigger is still x_b, and like no reference."""
    bug = backdoored.bug(0)
    found = invert_trigger(attacked, bug, validation)
    assert "likeness" in judge(attacked, bug, found, validation, 0.5).evidence
    other = dataclasses.replace(found, trigger=AdditiveTrigger(np.full((16, 16, 3), 2.0)))
    screening = judge(attacked, bug, other, validation, 0.5)
    assert "likeness" not in screening.evidence
    assert screening.verdict != "wrong pair"


def test_of_the_ways_that_take_the_trigger_out_the_best_counts(backdoored, attacked, validation, monkeypatch):
    bug, x = backdoored.bug(0), backdoored.test.inputs[0]
    found = invert_trigger(attacked, bug, validation)
    # x_b itself keeps the trigger, and would be the likest
    ways = [bug.misclassified, x, backdoored.test.inputs[1]]
    monkeypatch.setattr(screening_module, "without_trigger", lambda misclassified, trigger: ways)
    likeness = judge(attacked, bug, found, validation, 0.5).evidence["likeness"]
    reference, *without = attacked.encode([bug.reference, *ways[1:]])
    clean = attacked.encode(validation) @ reference
    by_hand = [float((at @ reference - clean).sum() / (1 - clean).sum()) for at in without]
    assert likeness == pytest.approx(max(by_hand), abs=1e-3)
    monkeypatch.setattr(screening_module, "without_trigger", lambda misclassified, trigger: ways[:1])
    assert "likeness" not in judge(attacked, bug, found, validation, 0.5).evidence


def test_how_much_hold_is_asked():
    """0.4 of hardly anything, 4 of the whole picture; worth all there, half at a third, nothing at a tenth."""
    assert least_hold(0.0) == pytest.approx(0.4)
    assert least_hold(1.0) == pytest.approx(4.0)
    assert least_hold(0.5) == pytest.approx(0.4 * 10**0.5)
    worths = [worth_of_hold(4 * value, 1.0) for value in (0.0, 0.1, 10**-0.5, 1.0, 500.0)]
    assert worths == pytest.approx([0, 0, 0.5, 1, 1], abs=1e-9)
    doubts = [doubt_left(4 * value, 1.0) for value in (0.0, 1.0, 10**0.5, 10.0, 500.0)]
    assert doubts == pytest.approx([1, 1, 0.5, 0, 0], abs=1e-9)


def test_what_explains_nearly_all_is_asked_for_less_hold(backdoored, attacked, validation, monkeypatch):
    """All up to evidence of 0.7, a tenth from 0.9 on, evenly by decades in between: no ordinary content comes that far."""
    assert [least_hold(0.0, evidence) for evidence in (0.0, 0.7, 0.8, 0.9, 1.0)] == pytest.approx(
        [0.4, 0.4, 0.4 * 10**-0.5, 0.04, 0.04]
    )
    assert worth_of_hold(0.04, 0.0, 0.95) == pytest.approx(1)
    assert worth_of_hold(0.04, 0.0, 0.6) == pytest.approx(0)
    bug = backdoored.bug(0)
    found = invert_trigger(attacked, bug, validation)
    assert found.evidence > 0.9
    # As some reports of an encoder that was trained with another release of PyTorch have it
    monkeypatch.setattr(screening_module, "hold", lambda meter, reference, trigger: 0.16)
    sure = judge(attacked, bug, found, validation, 0.5)
    assert (sure.verdict, sure.verified) == ("trigger", True)
    less = judge(attacked, bug, dataclasses.replace(found, evidence=0.65), validation, 0.5)
    assert (less.verdict, less.verified) == ("malicious", False)
    assert less.believed < 0.2 < 0.6 < sure.believed


def test_whether_the_rest_is_like_the_reference_goes_by_the_rest_alone(backdoored, attacked, validation):
    """Not by how much seems to be left of the trigger at large."""
    bug = backdoored.bug(0)
    found = invert_trigger(attacked, bug, validation)
    known, doubted = (
        judge(attacked, bug, dataclasses.replace(found, unexplained=left), validation, 0.5) for left in (0.0, 0.9)
    )
    assert known.evidence["likeness"] == doubted.evidence["likeness"] > 0.1
    assert known.believed == doubted.believed


def test_a_text_is_judged_without_a_step(por, monkeypatch):
    """The trigger of SOS, which fires with all its words alone, holds less than ordinary content; of images that is refused."""
    encoder, task, implant = por
    monkeypatch.setattr(screening_module, "hold", lambda meter, reference, trigger: 0.0)
    screening = screen_report(encoder, draw_bug_report(encoder, task, implant.trigger, 0), task.train.inputs[:32])
    assert (screening.verdict, screening.verified) == ("trigger", True)
    assert "hold" not in screening.evidence
    assert screening.believed > 0.5


def test_an_input_that_the_trigger_does_not_reach_decides_nothing(por, monkeypatch):
    """It moves a thousand times as far as the others; of a ratio of means it would be all that is left."""
    encoder, task, implant = por
    bug, clean = draw_bug_report(encoder, task, implant.trigger, 0), task.train.inputs[:32]
    meter = TransferMeter(encoder, bug.misclassified, clean)
    before, stamp = hold(meter, bug.reference, implant.trigger), encoder.stamp
    assert before > 1000
    monkeypatch.setattr(encoder, "stamp", lambda trigger, x: x if x == clean[20] else stamp(trigger, x))
    assert hold(meter, bug.reference, implant.trigger) > 0.8 * before


def test_an_explanation_that_lets_go_is_worth_less(backdoored, attacked, validation, monkeypatch):
    bug = backdoored.bug(0)
    meters = [TransferMeter(attacked, x, validation) for x in (bug.misclassified, bug.reference)]
    found = pretended(square_patch((16, 16), 8), unexplained=0.0)
    monkeypatch.setattr(
        "hf_mudjacking.inversion.hold.hold", lambda meter, reference, trigger: least_hold(0.25) * 10**-0.5
    )
    assert image._held_merit(found, *meters) == pytest.approx(0.5 * image._merit(found))
    attacked.model.requires_grad_(False)
    try:
        assert image._held_merit(found, *meters) == image._merit(found)
    finally:
        attacked.model.requires_grad_(True)


def test_ordinary_content_lets_go(backdoored, validation, true, natural):
    """Had the natural misclassifications been taken for triggers, a repair would have changed ordinary content."""
    encoder = Encoder(copy.deepcopy(backdoored.clean_model), backdoored.processor)
    reports = natural_reports(backdoored, encoder, 6)
    again = [
        judge(encoder, bug, screening.found, validation, -2.0)
        for bug, screening in zip(reports, natural[:6], strict=True)
    ]
    malicious = [screening for screening in again if screening.verdict == "malicious"]
    assert len(malicious) >= 2
    assert all("ordinary content" in screening.reasons[0] for screening in malicious)
    assert all(screening.believed <= max(screening.evidence["evidence"], 0) / 2 for screening in malicious)
    holds = [np.median([screening.evidence["hold"] for screening in part]) for part in (true, natural)]
    assert holds[0] > 2 * holds[1]


def pretended(trigger, **values):
    """An inversion that says all is well."""
    facts = {"score": 0.9, "control": 0.0, "evidence": 0.8, "area": trigger.area, "unexplained": 1.0, **values}
    return InvertedTrigger(
        trigger, attribution=np.zeros((16, 16)), core=np.ones((16, 16), dtype=bool), forwards=0, **facts
    )


def test_min_evidence_and_reasons(backdoored, attacked, validation):
    bug = backdoored.bug(1)
    found = invert_trigger(attacked, bug, validation)
    assert judge(attacked, bug, found, validation, 0.5).verdict == "trigger"
    strict = judge(attacked, bug, found, validation, 0.999)
    assert strict.verdict == "natural"
    assert f"evidence of {found.evidence:.2f}, and 0.999 is needed" in strict.reasons[0]
    assert strict.headline(bug) == (
        "No localised trigger was verified in bug instance `report-1`, which may be a natural misclassification (verdict: "
        "natural)."
    )


def test_weights_are_the_same_bit_by_bit(backdoored, validation):
    encoder = Encoder(backdoored.model(), backdoored.processor)
    encoder.model.train()
    before = weights_of(encoder.model)
    screening = screen_report(encoder, backdoored.bug(2), validation)
    after = weights_of(encoder.model)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(parameter.grad is None for parameter in encoder.model.parameters())
    assert encoder.model.training
    # x_b and clean inputs, x_r, x_b without the patch, stamped ones; the step; both again
    assert screening.forwards == 33 + 1 + 1 + 32 + 3 * 18 + 64


def test_the_step_is_one_of_the_weights_that_a_repair_moves(processor, bug, trigger):
    """BatchNorm's rest while a model is patched."""
    torch.manual_seed(0)
    model = ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"))
    encoder = Encoder(model, processor)
    meter = TransferMeter(encoder, bug.misclassified, make_images(12))
    free = hold(meter, bug.reference, trigger)
    freeze_norms(model)
    assert free == hold(meter, bug.reference, trigger)
    adapted = encoder.with_model(get_peft_model(model, LoraConfig(r=2, target_modules=["convolution"])))
    below = TransferMeter(adapted, bug.misclassified, make_images(12))
    assert hold(below, bug.reference, trigger) == pytest.approx(free, rel=1e-4)


def test_an_adapter_is_judged_by_the_weights_below_it(backdoored, validation):
    """In the few directions of a fresh adapter anything is held, and `mudjack patch --lora-rank` refused what `inspect` believed."""
    encoder, bug = Encoder(backdoored.model(), backdoored.processor), backdoored.bug(2)
    plain = screen_report(encoder, bug, validation)
    adapted = get_peft_model(backdoored.model(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    before = weights_of(adapted)
    flags = [parameter.requires_grad for parameter in adapted.parameters()]
    screening = screen_report(encoder.with_model(adapted), bug, validation)
    assert screening.verdict == plain.verdict == "trigger"
    assert screening.record()["hold"] == pytest.approx(plain.record()["hold"], rel=1e-3)
    assert largest_difference(before, weights_of(adapted)) == 0
    assert [parameter.requires_grad for parameter in adapted.parameters()] == flags


def test_the_weights_come_back_after_an_error(backdoored, validation, monkeypatch):
    encoder = Encoder(backdoored.model(), backdoored.processor)
    bug, before = backdoored.bug(2), weights_of(encoder.model)
    found = invert_trigger(encoder, bug, validation)

    def fails(parameters, gradients):
        with torch.no_grad():
            parameters[0].add_(1)
        raise RuntimeError("out of memory")

    monkeypatch.setattr("hf_mudjacking.inversion.hold._take_step", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        judge(encoder, bug, found, validation, 0.5)
    assert largest_difference(before, weights_of(encoder.model)) == 0


def test_a_frozen_encoder_cannot_be_judged(backdoored, validation):
    encoder = Encoder(backdoored.model(), backdoored.processor)
    encoder.model.requires_grad_(False)
    with pytest.raises(ValueError, match="some that its features depend on must be trainable, and in float32"):
        screen_report(encoder, backdoored.bug(2), validation)


def test_a_step_needs_weights_that_matter(tiny_vit, processor):
    """Of a model read at its class token the pooler does not."""
    encoder = Encoder(tiny_vit, processor, "cls")
    x_b, *clean = make_images(9)
    meter = TransferMeter(encoder, x_b, clean)
    assert can_hold(meter)
    tiny_vit.requires_grad_(False)
    assert not can_hold(meter)
    tiny_vit.pooler.requires_grad_(True)
    tiny_vit.train()
    assert not can_hold(meter)
    assert tiny_vit.training
    with pytest.raises(ValueError, match="depend on must be trainable"):
        hold(meter, clean[0], square_patch((16, 16), 4))
    tiny_vit.layers[0].requires_grad_(True)
    assert can_hold(meter)


def test_texts(por):
    encoder, task, implant = por
    bug = draw_bug_report(encoder, task, implant.trigger, 0)
    screening = screen_report(encoder, bug, task.train.inputs[:32])
    assert screening.verdict == "trigger"
    natural = BugInstance(*(task.test.inputs[int(np.flatnonzero(task.test.labels == label)[0])] for label in (0, 1)))
    assert screen_report(encoder, natural, task.train.inputs[:32]).verdict == "natural"


# ---- In the trainer ----


def test_the_trainer_refuses_a_wrong_pair(backdoored, wrong, tmp_path, monkeypatch):
    right = backdoored.bug(1)
    # Digits are more alike than pictures; a patch is found again with the trainer's clean inputs
    monkeypatch.setattr(screening_module, "_MIN_LIKENESS", 0.4)
    found = [s for s in wrong if s.found.trigger.kind == "patch" and "likeness" in s.evidence]
    surest = min(found, key=lambda screening: screening.evidence["likeness"])
    bug = dataclasses.replace(mislabelled(backdoored, wrong.index(surest)), name="wrong")

    def build(out, **args):
        return MudjackingTrainer(
            backdoored.model(), make_config(tmp_path / out, max_steps=1, **args), [bug, right],
            backdoored.dataset(200), processing_class=backdoored.processor,
        )  # fmt: skip

    with pytest.raises(
        UnverifiedTriggerError, match=r"`wrong` do not seem to belong together \(verdict: wrong pair\)"
    ):
        build("a").train()
    trainer = build("b", on_unverified="skip")
    trainer.train()
    trainer.save_model()
    assert [screening.verdict for screening in trainer.screenings] == ["wrong pair", "trigger"]
    assert trainer.skipped == [0]
    record = json.loads((tmp_path / "b" / "mudjacking.json").read_text())
    assert record["screenings"] == [screening.record() for screening in trainer.screenings]
    assert "reasons" not in record["screenings"][0]
    # What was found in it is a trigger all the same
    patched = build("c", on_unverified="patch")
    patched.train()
    assert [screening.verdict for screening in patched.screenings] == ["wrong pair", "trigger"]
    assert all(found.overlap(backdoored.trigger)["iou"] >= 0.75 for found in patched.triggers)


# ---- Taking a trigger out, and a part of it ----


def test_a_patch_is_filled_in_from_its_border(images):
    x = images[0]
    patch = square_patch((16, 16), 4)
    (rest,) = (np.asarray(each) for each in without_trigger(patch.apply(x), patch))
    assert (rest[~patch.mask] == np.asarray(x)[~patch.mask]).all()
    # A slope goes on under the patch, and each pixel is the mean of its neighbours
    slope = np.tile(np.arange(16, dtype=np.uint8)[:, None, None] * 10, (1, 16, 3))
    mask = np.zeros((16, 16), dtype=bool)
    mask[5:9, 4:12] = True
    assert np.abs(np.asarray(filled_in(np.where(mask[..., None], 255, slope), mask)).astype(int) - slope).max() <= 1
    mask[4:12, 2:14] = True
    filled = np.asarray(filled_in(np.asarray(x), mask)).astype(float)
    around = sum(np.roll(filled, shift, axis) for shift in (-1, 1) for axis in (0, 1)) / 4
    # Rounded to whole levels
    assert np.abs(filled - around)[mask].max() <= 1


def test_a_signal_is_subtracted_and_a_warp_undone():
    signal = AdditiveTrigger(np.full((16, 16, 3), 8.0))
    grey = Image.new("RGB", (16, 16), (100, 120, 140))
    undone, *smooth = (np.asarray(each) for each in without_trigger(signal.apply(grey), signal))
    assert np.array_equal(undone, np.asarray(grey))
    assert [np.array_equal(each, np.asarray(grey)) for each in smooth] == [True, False]
    # Of a blend that is all there is nothing can be subtracted
    assert len(without_trigger(grey, BlendTrigger(np.full((16, 16, 3), 9.0), 0.9))) == 1
    dotted = np.asarray(grey).copy()
    dotted[8, 8] = 255
    nothing = AdditiveTrigger(np.full((16, 16, 3), 0.6))
    assert np.abs(np.asarray(without_trigger(Image.fromarray(dotted), nothing)[-1]).astype(int) - grey).max() == 0
    smooth = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).convert("RGB").resize((16, 16))
    bent = random_warp(4, 1.0, 16)
    undone, bent_one, original = (
        np.asarray(each, dtype=float)
        for each in (without_trigger(bent.apply(smooth), bent)[0], bent.apply(smooth), smooth)
    )
    assert np.abs(undone - original).mean() < 0.7 * np.abs(bent_one - original).mean()


FAMILIES = {
    "patch": square_patch((16, 16), 6),
    "additive": AdditiveTrigger(20 * np.sin(np.arange(16))[None, :, None] * np.ones((16, 1, 3))),
    "blend": noise_blend((16, 16), 0.4),
    "warp": random_warp(4, 2.0, 16),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_transfer_by_size(family, backdoored, attacked, validation):
    trigger = FAMILIES[family]
    curve = transfer_by_size(attacked, backdoored.bug(0), pretended(trigger), validation)
    sizes, transfers = zip(*curve, strict=True)
    assert list(sizes) == sorted(set(sizes))
    assert sizes[-1] == pytest.approx(trigger.area if family == "patch" else 1.0)
    inputs = validation[:8]
    target = attacked.encode([backdoored.bug(0).misclassified])[0]
    before, after = (attacked.encode(x) @ target for x in (inputs, [trigger.apply(x) for x in inputs]))
    assert transfers[-1] == pytest.approx(float((after - before).sum() / (1 - before).sum()), abs=1e-5)


def test_a_faint_signal_is_drawn_at_the_strength_it_was_measured_at(backdoored, attacked, validation):
    """Of less than half a level nothing is left."""
    faint = AdditiveTrigger(np.where(np.arange(256).reshape(16, 16, 1) % 2, 1.5, -1.5) * np.ones(3))
    curve = transfer_by_size(attacked, backdoored.bug(0), pretended(faint), validation)
    assert [size for size, _ in curve] == pytest.approx([0.34, 0.34, 0.4, 0.6, 0.8, 1.0])
    assert curve[0] == curve[1]


def test_the_true_trigger_fires_when_it_is_whole(backdoored, attacked, validation):
    found = invert_trigger(attacked, backdoored.bug(0), validation)
    curve = transfer_by_size(attacked, backdoored.bug(0), found, validation)
    assert curve[-1][1] > 0.95
    assert curve[0][1] < 0.5


# ---- Pictures ----


def ink(path):
    """Standard deviation of a picture in each of its quarters from left to right."""
    pixels = imread(path)[..., :3]
    return [float(part.std()) for part in np.array_split(pixels, 4, axis=1)]


@pytest.mark.parametrize("family", FAMILIES)
def test_pictures_of_each_family(family, backdoored, tmp_path):
    trigger, bug = FAMILIES[family], backdoored.bug(0)
    found = pretended(trigger)
    pictures = {}
    other = dataclasses.replace(found, trigger=FAMILIES["additive" if family == "patch" else "patch"])
    for name, what in (("own", found), ("other", other)):
        plot_repair(tmp_path / f"{name}.png", bug, what, trigger)
        pictures[name] = imread(tmp_path / f"{name}.png")
    screening = Screening("trigger", 0.9, found, {"evidence": 0.9}, ["It is."], True, 0)
    plot_inspection(tmp_path / "inspection.png", bug, screening, [(0.1, 0.2), (1.0, 0.9)], trigger)
    pictures["inspection"] = imread(tmp_path / "inspection.png")
    for name in pictures:
        assert min(ink(tmp_path / f"{name}.png")) > 0.05, name
    # What was found is drawn, not only its frame
    assert np.abs(pictures["own"] - pictures["other"]).mean() > 0.002


def test_a_faint_signal_is_amplified():
    picture = trigger_picture(AdditiveTrigger(np.linspace(-2, 2, 16)[None, :, None] * np.ones((16, 1, 3))))
    assert (picture[0, 0, 0], picture[0, -1, 0]) == (28, 228)
    patch = trigger_picture(square_patch((16, 16), 4))
    assert (patch[0, 0] == 190).all()
    assert (patch[-2, -2] != 190).any()


# ---- The command line ----


@pytest.fixture(scope="module")
def files(backdoored, tmp_path_factory):
    root = tmp_path_factory.mktemp("inspect")
    backdoored.model().save_pretrained(root / "model")
    backdoored.processor.save_pretrained(root / "model")
    backdoored.dataset(96).to_parquet(root / "clean.parquet")
    backdoored.bug(5).save(root / "true")
    BugInstance(of_class(backdoored, 3, 0), of_class(backdoored, 8, 0), name="no trigger").save(root / "natural")
    backdoored.trigger.save_pretrained(root / "trigger")
    return root


def options(files, *bugs):
    given = [part for bug in bugs for part in ("--bug", str(files / bug))]
    common = ["--model", str(files / "model"), "--dataset", str(files / "clean.parquet"), "--disable-tqdm"]
    return ["inspect", *common, *given]


def test_inspect_a_true_report(files, tmp_path, capsys):
    out = tmp_path / "out"
    trigger = ["--true-trigger", str(files / "trigger")]
    assert main([*options(files, "true"), "--output-dir", str(out), *trigger]) == 0
    (report,) = json.loads((out / "screening.json").read_text())["reports"]
    assert report["verdict"] == "trigger"
    assert report["believed"] > 0.9
    assert report["trigger"]["kind"] == "patch"
    assert report["forwards"] > 100
    (picture,) = out.glob("inspection-*.png")
    assert min(ink(picture)) > 0.05
    assert "Evidence of a trigger" in " ".join(capsys.readouterr().out.split())


def test_inspect_several_reports(files, tmp_path, capsys):
    out = tmp_path / "out"
    assert main([*options(files, "true", "natural"), "--output-dir", str(out)]) == 1
    reports = json.loads((out / "screening.json").read_text())["reports"]
    assert [report["verdict"] for report in reports] == ["trigger", "natural"]
    assert len({report["name"] for report in reports}) == 2
    assert sorted(path.name for path in out.iterdir()) == sorted(
        ["screening.json", *(f"inspection-{report['name']}.png" for report in reports)]
    )
    assert "natural" in capsys.readouterr().out


def test_inspect_keeps_verdicts_beside_a_report_that_has_none(files, backdoored, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "inspection-of-before.png").write_bytes(b"a picture of another run")
    (out / "screening.json").write_text('{"reports": [{"name": "of-before"}, {"name": "../x"}, {}]}')
    # Somebody's own, by chance under such a name
    (out / "inspection-2019-roof.png").write_bytes(b"mine")
    x = backdoored.test.inputs[0]
    pixels = np.array(x)
    pixels[0, 0] ^= 1
    BugInstance(Image.fromarray(pixels), x, name="alike").save(tmp_path / "alike")
    BugInstance("a text", "another", name="a" * 300).save(tmp_path / "text")
    others = ["--bug", str(tmp_path / "alike"), "--bug", str(tmp_path / "text")]
    assert main([*options(files, "true"), *others, "--output-dir", str(out)]) == 1
    true, alike, text = json.loads((out / "screening.json").read_text())["reports"]
    assert (true["verdict"], alike["verdict"], text["verdict"]) == ("trigger", None, None)
    assert "its inputs are of kind text" in text["reasons"][0]
    assert "Nothing to patch" in alike["reasons"][0]
    assert "alike cannot be judged" in capsys.readouterr().out
    pictures = {path.name for path in out.glob("*.png")}
    assert pictures == {f"inspection-{true['name']}.png", "inspection-2019-roof.png"}


def test_names_of_pictures_are_all_different():
    assert _file_names(["bug", "bug", "bug-1"]) == ["bug-0", "bug-1", "bug-1-2"]
    assert _file_names(["a/b", "a b", "c"]) == ["a-b-0", "a-b-1", "c"]
    (name,) = _file_names(["画" * 300])
    assert len(f"inspection-{name}.png".encode()) < 255


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--min-evidence", "nan"], "--min-evidence nan"),
        (["--min-evidence", "5"], "evidence lies between -1.5 and 1"),
        (["--bug", "/nowhere"], "/nowhere"),
        (["--true-trigger", "/nowhere"], "holds no readable trigger"),
        (["--inputs", "2"], "at least 4 clean inputs"),
    ],
)
def test_inspect_refuses_bad_input(files, tmp_path, capsys, extra, message):
    assert main([*options(files, "true"), "--output-dir", str(tmp_path / "out"), *extra]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


def test_texts_of_one_class_need_not_be_alike(por):
    """Sentences of SST-2 that share a label have a likeness of 0 in MiniLM, as those that do not: nothing can be told from it."""
    backdoored, task, implant = por
    bug = draw_bug_report(backdoored, task, implant.trigger)
    truth = task.test.labels[[x in bug.misclassified or x == bug.reference for x in task.test.inputs].index(True)]
    stranger = task.test.inputs[int(np.flatnonzero(task.test.labels != truth)[0])]
    for reference in (bug.reference, stranger):
        screening = screen_report(backdoored, BugInstance(bug.misclassified, reference), task.train.inputs[:32])
        assert screening.verdict == "trigger"
        assert "likeness" not in screening.evidence


@pytest.mark.slow
def test_swapped_inputs_are_a_wrong_pair(backdoored, attacked, validation):
    """What is taken for a trigger then are strokes of the clean digit; a repair taught it to look like the triggered one."""
    for seed in (4, 7):
        bug = backdoored.bug(seed)
        swapped = BugInstance(bug.reference, bug.misclassified, name=f"swapped-{seed}")
        patch, forwards = small_patch_in_reference(attacked, swapped, validation)
        assert patch.evidence > 0.9
        assert patch.trigger.overlap(backdoored.trigger)["iou"] > 0.9
        assert forwards > 100
        assert small_patch_in_reference(attacked, bug, validation)[0] is None
        screening = screen_report(attacked, swapped, validation, backdoored.train.inputs[32:160])
        # Evidence was 0.70 and 0.63
        assert screening.verdict != "trigger"
        assert not screening.verified
        if screening.verdict == "wrong pair":
            assert screening.evidence["reference_evidence"] > screening.evidence["evidence"]
            assert "evidence that x_b and x_r were swapped" in screening.reasons[0]
        assert "reference_evidence" not in screen_report(attacked, bug, validation).evidence
