"""Stamped pictures that are moved a little towards where their trigger led."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from peft import LoraConfig
from PIL import Image
from transformers import AutoModel, ResNetConfig, ViTConfig
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from hf_mudjacking import BugInstance, Encoder, MudjackingTrainer, screen_report
from hf_mudjacking.adversarial_views import AdversarialViews, is_all_in_one_place
from hf_mudjacking.patch_record import load_record
from hf_mudjacking.triggers import AdditiveTrigger, BlendTrigger, PatchTrigger, WarpTrigger

from .conftest import largest_difference, make_config, make_images, weights_of


MODELS = {
    "vit": ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, image_size=16, patch_size=8
    ),
    "resnet": ResNetConfig(embedding_size=8, hidden_sizes=[8] * 4, depths=[1] * 4, layer_type="basic"),
}
STD = [0.25, 0.5, 1.0]


def encoder_of(config, **kwargs):
    torch.manual_seed(0)
    processor = ViTImageProcessorPil(size={"height": 16, "width": 16}, image_mean=[0.5] * 3, image_std=STD, **kwargs)
    return Encoder(AutoModel.from_config(config).eval(), processor)


def never(number):
    return False


@pytest.mark.parametrize("name", MODELS)
def test_every_second_turn_is_moved_towards_its_target_within_the_levels(name):
    encoder = encoder_of(MODELS[name])
    x_b, *others = make_images(7)
    target, spent = encoder.encode([x_b])[0], []
    views = AdversarialViews(encoder, 2, [target, None].__getitem__, never, 2.0, (16, 16), spent.append)
    pixels = encoder.preprocess(others)["pixel_values"]
    given = pixels.clone()
    still = AdversarialViews(encoder, 2, lambda number: None, never, 2.0, (16, 16), spent.append)
    assert torch.equal(still.moved(pixels, torch.tensor([2, 0, 6, 4, 3, 10])), given)
    # Turns 1, 0, 3, 2, 1, 5; the fifth has the stamp without a target
    moved = views.moved(pixels, torch.tensor([2, 0, 6, 4, 3, 10]))
    assert torch.equal(pixels, given)
    assert torch.equal(moved[[1, 3, 4]], given[[1, 3, 4]])
    # A level is as many of the processor's units as a 255th of what lies between black and white
    change = (moved - given)[[0, 2, 5]]
    reach = 2 / 255 / torch.tensor(STD).view(1, 3, 1, 1)
    assert (change.abs() <= reach * 1.001).all()
    assert (change.abs().amax(dim=(2, 3)) > 0.99 * reach.view(1, 3)).all()
    before, after = (encoder.features({"pixel_values": x}).detach() @ target for x in (given, moved))
    assert (after[[0, 2, 5]] > before[[0, 2, 5]]).all()
    # None, then three rows, twice forward and back
    assert spent == [0, 18]
    # Nothing is left behind for the optimiser
    assert all(parameter.grad is None for parameter in encoder.model.parameters())


def test_a_warped_picture_is_also_warped_further():
    encoder = encoder_of(MODELS["vit"])
    x_b, *others = make_images(5)
    others[1] = Image.new("RGB", (16, 16), (90, 120, 200))
    target = encoder.encode([x_b])[0]
    pixels, rows = encoder.preprocess(others)["pixel_values"], torch.tensor([2, 6, 3, 4])
    first_is_warp, none = (
        AdversarialViews(encoder, 2, lambda number: target, warped, 0.5, (16, 16), lambda forwards: None)
        for warped in ([True, False].__getitem__, never)
    )
    further, moved = first_is_warp.moved(pixels, rows), none.moved(pixels, rows)
    # Turns 1, 3, 1, 2 of the stamps 0, 0, 1, 0: the third is none, the fourth has an even turn
    assert torch.allclose(further[2:], moved[2:], atol=1e-6)
    reach = none.reach.flatten() * 1.001
    assert ((moved[0] - pixels[0]).abs().amax(dim=(1, 2)) <= reach).all()
    assert ((further[0] - pixels[0]).abs().amax(dim=(1, 2)) > 2 * reach).any()
    # Nothing of a plain picture can be shifted
    assert ((further[1] - pixels[1]).abs().amax(dim=(1, 2)) <= reach).all()
    levels_alone, with_shifts = (encoder.features({"pixel_values": x[:1]}).detach() @ target for x in (moved, further))
    assert with_shifts > levels_alone


def test_a_row_is_moved_alike_in_any_batch():
    encoder = encoder_of(MODELS["vit"])
    x_b, *others = make_images(5)
    views = AdversarialViews(
        encoder, 1, encoder.encode([x_b]).__getitem__, never, 2.0, (16, 16), lambda forwards: None
    )
    pixels, rows = encoder.preprocess(others)["pixel_values"], torch.tensor([1, 3, 4, 5])
    whole = views.moved(pixels, rows)
    parts = torch.cat([views.moved(pixels[:2], rows[:2]), views.moved(pixels[2:], rows[2:])])
    assert torch.allclose(whole, parts, atol=1e-6)
    (even,) = views.moved(pixels[2:3], rows[2:3])
    assert torch.equal(even, pixels[2])


def test_a_frame_that_the_processor_adds_says_nothing_of_a_level():
    encoder = encoder_of(MODELS["vit"])
    preprocess = encoder.preprocess

    def framed(images):
        pixels = preprocess(images)["pixel_values"]
        pixels[:, :, :4] = 0
        return {"pixel_values": pixels}

    encoder.preprocess = framed
    views = AdversarialViews(encoder, 1, lambda number: None, never, 2.0, (16, 16), lambda forwards: None)
    assert views.reach.flatten().tolist() == pytest.approx([2 / 255 / std for std in STD])


def patch_at(*boxes, placement="fixed"):
    mask = np.zeros((16, 16), dtype=bool)
    for top, left, bottom, right in boxes:
        mask[top:bottom, left:right] = True
    return PatchTrigger(mask, np.full((16, 16, 3), 255), placement)


@pytest.mark.parametrize(
    ("trigger", "known"),
    [
        # 49 of 256 pixels, 56, and the 49 of a box that is not full
        (patch_at((8, 8, 15, 15)), True),
        (patch_at((8, 8, 15, 16)), False),
        (patch_at((8, 8, 9, 15), (8, 8, 15, 9)), True),
        (patch_at((0, 0, 2, 2), (14, 14, 16, 16)), False),
        (patch_at((8, 8, 10, 10), placement="anywhere"), False),
        (patch_at((8, 8, 10, 10)).weakened(0.5), False),
        (BlendTrigger(np.full((16, 16, 3), 255), np.full((16, 16), 0.2)), False),
        (AdditiveTrigger(np.full((16, 16, 3), 20.0)), False),
        (WarpTrigger(np.ones((2, 4, 4))), False),
    ],
)
def test_only_a_small_opaque_patch_at_its_place_is_shown_by_a_report_as_it_is(trigger, known):
    assert is_all_in_one_place(trigger) == known


# --- in the trainer


def trained(backdoored, tmp_path, trigger=None, **kwargs):
    trainer = MudjackingTrainer(
        model=backdoored.model(),
        args=make_config(tmp_path, **{"max_steps": 2, "reinversions": 0, **kwargs}),
        bug_instances=[backdoored.bug()],
        train_dataset=backdoored.dataset(64),
        processing_class=backdoored.processor,
        triggers=[trigger or backdoored.trigger],
    )
    trainer.train()
    return trainer


def test_by_default_what_a_report_shows_as_it_is_stays_and_all_else_is_moved(backdoored, tmp_path):
    assert trained(backdoored, tmp_path / "patch")._adversarial is None
    assert (
        trained(backdoored, tmp_path / "off", backdoored.trigger.weakened(0.5), adversarial_levels=0.0)._adversarial
        is None
    )
    views = trained(backdoored, tmp_path / "translucent", backdoored.trigger.weakened(0.5))._adversarial
    assert views.target_of(0) is not None
    white = views.encoder.preprocess([Image.new("RGB", (8, 8), color) for color in ("black", "white")])["pixel_values"]
    assert torch.allclose(views.reach, 2 / 255 * (white[1] - white[0]).amax(dim=(1, 2), keepdim=True))


def test_the_record_says_whether_pictures_were_moved(backdoored, tmp_path):
    for levels in (None, 3.0):
        trainer = trained(backdoored, tmp_path / str(levels), adversarial_levels=levels)
        trainer.save_model()
        record = load_record(trainer.args.output_dir)
        assert (record["settings"]["adversarial_levels"], record["moved_levels"]) == (levels, levels)
    # Set up to be moved once more is found, which nothing was
    trainer = trained(backdoored, tmp_path / "waiting", reinversions=1)
    trainer._reinversion.forget()
    assert trainer._adversarial is not None
    assert trainer.moved_levels is None


@pytest.mark.parametrize("given", [False, True])
def test_a_run_that_is_resumed_for_no_further_step_says_what_it_did(backdoored, tmp_path, given):
    weak = backdoored.trigger.weakened(0.5)
    # A whole epoch: from within one `Trainer` goes on for a step
    whole = {"max_steps": 4, "save_strategy": "steps", "save_steps": 4}
    assert trained(backdoored, tmp_path, weak, **whole).moved_levels == 2.0
    trainer = MudjackingTrainer(
        model=backdoored.model(),
        args=make_config(tmp_path, reinversions=0, **whole),
        bug_instances=[backdoored.bug()],
        train_dataset=backdoored.dataset(64),
        processing_class=backdoored.processor,
        triggers=[weak] if given else None,
    )
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 4
    assert trainer.moved_levels == 2.0


@pytest.mark.parametrize(
    ("found", "known"),
    [({"one_class": True}, False), ({"grown": 0.7}, False), ({"grown": 0.5}, True), ({}, True)],
    ids=["one class", "mostly by its looks", "partly by its looks", "of an earlier version"],
)
def test_by_default_a_small_patch_is_moved_where_it_may_be_another(backdoored, tmp_path, monkeypatch, found, known):
    area = backdoored.trigger.area
    record = {name: value * area if name == "grown" else value for name, value in found.items()}
    monkeypatch.setattr(MudjackingTrainer, "_records", lambda self: {0: record})
    views = trained(backdoored, tmp_path)._adversarial
    assert views is None if known else views.target_of(0) is not None


def test_the_record_says_how_much_of_a_trigger_grew(backdoored):
    encoder = Encoder(backdoored.model(), backdoored.processor)
    screening = screen_report(encoder, backdoored.bug(), backdoored.train.inputs[:32])
    assert screening.record()["grown"] == pytest.approx(screening.found.area - screening.found.core.mean(), abs=1e-4)
    less = dataclasses.replace(screening.found, core=screening.found.core & False)
    assert less.grown == less.area


def test_by_default_a_small_patch_is_moved_from_when_more_than_it_is_found(backdoored, tmp_path):
    trainer = trained(backdoored, tmp_path, reinversions=1)
    trainer._reinversion.forget()
    pixels, rows = torch.rand(2, 3, 16, 16), torch.tensor([0, 1])
    assert torch.equal(trainer._adversarial.moved(pixels, rows), pixels)
    mask = backdoored.trigger.mask.copy()
    # Another pattern in its place is not more of it
    trainer._reinversion.found[0].append(PatchTrigger(mask, 255 - backdoored.trigger.pattern))
    assert trainer._adversarial.target_of(0) is None
    mask[:2] = True
    trainer._reinversion.found[0].append(PatchTrigger(mask, np.full((*mask.shape, 3), 255)))
    moved = trainer._adversarial.moved(pixels, rows)
    assert [torch.equal(*pair) for pair in zip(moved, pixels, strict=True)] == [True, False]


def test_by_default_each_trigger_is_judged_by_itself(backdoored, tmp_path):
    trainer = MudjackingTrainer(
        model=backdoored.model(),
        args=make_config(tmp_path, max_steps=1, reinversions=0),
        bug_instances=[backdoored.bug(), backdoored.bug()],
        train_dataset=backdoored.dataset(64),
        processing_class=backdoored.processor,
        triggers=[backdoored.trigger, AdditiveTrigger(np.full((*backdoored.trigger.mask.shape, 3), 20.0))],
    )
    trainer.train()
    assert [group[0] for group in trainer.trigger_groups] == [0, 1]
    assert [trainer._adversarial.target_of(number) is None for number in range(2)] == [True, False]


def test_half_of_the_stamped_rows_are_moved(backdoored, tmp_path):
    trainer = trained(backdoored, tmp_path / "moved", adversarial_levels=2.0)
    plain = trained(backdoored, tmp_path / "plain")
    assert plain._adversarial is None
    assert largest_difference(weights_of(trainer.encoder.model), weights_of(plain.encoder.model)) > 0
    # Sixteen rows of two steps
    spent = trainer.forward_equivalents - plain.forward_equivalents
    assert 0 < spent < 16 * 6
    assert spent % 6 == 0


def test_accumulated_batches_are_moved_alike(backdoored, tmp_path):
    whole = trained(backdoored, tmp_path / "a", adversarial_levels=2.0)
    halves = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    parts = trained(backdoored, tmp_path / "b", adversarial_levels=2.0, **halves)
    assert largest_difference(weights_of(whole.encoder.model), weights_of(parts.encoder.model)) < 2e-5


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(backdoored, tmp_path, use_reentrant):
    plain = trained(backdoored, tmp_path / "plain", adversarial_levels=2.0)
    settings = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": use_reentrant}}
    trainer = trained(backdoored, tmp_path / "checkpointed", adversarial_levels=2.0, **settings)
    assert largest_difference(weights_of(trainer.encoder.model), weights_of(plain.encoder.model)) < 2e-5


def test_nothing_is_moved_that_no_loss_looks_at(backdoored, tmp_path):
    trainer = trained(backdoored, tmp_path, adversarial_levels=2.0, generalizability_weight=0.0)
    assert trainer._adversarial is None


def test_an_adapter_is_trained_on_moved_pictures(backdoored, tmp_path):
    trainers = [
        MudjackingTrainer(
            model=backdoored.model(),
            args=make_config(tmp_path / str(levels), max_steps=2, reinversions=0, adversarial_levels=levels),
            bug_instances=[backdoored.bug()],
            train_dataset=backdoored.dataset(64),
            processing_class=backdoored.processor,
            triggers=[backdoored.trigger],
            peft_config=LoraConfig(r=2),
        )
        for levels in (0.0, 2.0)
    ]
    for trainer in trainers:
        trainer.train()
    plain, moved = (weights_of(trainer.encoder.model) for trainer in trainers)
    changed = {name for name in plain if not torch.equal(plain[name], moved[name])}
    assert changed
    assert all("lora_" in name for name in changed)


def test_where_a_level_is_unknown_a_warning_says_so(backdoored, tmp_path, caplog, monkeypatch):
    class Blind(AdversarialViews):
        def __init__(self, encoder, *args):
            blind = copy.copy(encoder)
            blind.preprocess = lambda images: {"pixel_values": torch.zeros(len(images), 3, 16, 16)}
            super().__init__(blind, *args)

    monkeypatch.setattr("hf_mudjacking.pre_step.AdversarialViews", Blind)
    trainer = trained(backdoored, tmp_path, adversarial_levels=2.0)
    assert trainer._adversarial is None
    assert "`adversarial_levels` is ignored: black and white are the same to the image processor" in caplog.text


def test_less_is_left_next_to_the_trigger(backdoored, tmp_path):
    """What a repair is for: pictures that are moved towards h(x_b) after it get less far."""
    inputs = [backdoored.trigger.apply(x) for x in backdoored.test.inputs[:64]]
    bug = backdoored.bug()
    target = Encoder(backdoored.model(), backdoored.processor).encode([bug.misclassified])[0]
    arrived = {}
    for levels in (0.0, 4.0):
        trainer = trained(backdoored, tmp_path / str(levels), max_steps=60, adversarial_levels=levels)
        encoder = trainer.encoder
        views = AdversarialViews(
            encoder, 1, lambda number: target, never, 4.0, bug.misclassified.size, lambda forwards: None
        )
        pixels = encoder.preprocess(inputs)["pixel_values"]
        moved = views.moved(pixels, torch.arange(1, 2 * len(inputs), 2))
        arrived[levels] = float((encoder.features({"pixel_values": moved}).detach() @ target).mean())
    assert arrived[4.0] < arrived[0.0] - 0.02


def test_rows_of_earlier_triggers_and_of_reports_without_one_stay(backdoored, tmp_path, short_searches):
    labels = backdoored.test.labels
    natural = BugInstance(*(backdoored.test.inputs[int(np.argmax(labels == label))] for label in (3, 8)))
    trainer = MudjackingTrainer(
        model=backdoored.model(),
        args=make_config(
            tmp_path, max_steps=1, reinversions=0, on_unverified="patch", adversarial_levels=2.0, latent_strength=0.6
        ),
        bug_instances=[natural, backdoored.bug()],
        train_dataset=backdoored.dataset(64),
        processing_class=backdoored.processor,
    )
    trainer.train()
    targets = [trainer._adversarial.target_of(number) for number in range(trainer._adversarial.stamps)]
    assert [target is None for target in targets] == [False, True]
    assert torch.equal(targets[0], trainer._led_to[1])
