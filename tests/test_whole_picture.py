# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""Triggers that cover the whole picture, parts that come to light later, and what is stamped for them."""

import copy

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from hf_mudjacking import BugInstance, Encoder, MudjackingTrainer, invert_trigger
from hf_mudjacking.attacks import implant_blended
from hf_mudjacking.data import PatchingCollator
from hf_mudjacking.inversion import image
from hf_mudjacking.inversion.again import invert_again
from hf_mudjacking.inversion.parts_beside import parts_beside
from hf_mudjacking.inversion.pixels import PixelPath, to_tensor
from hf_mudjacking.inversion.pull import Pull
from hf_mudjacking.inversion.verification import TransferMeter
from hf_mudjacking.preprocessing import ImagePreprocessor
from hf_mudjacking.triggers import AdditiveTrigger, PatchTrigger, square_patch
from hf_mudjacking.triggers.base import correlation

from .conftest import largest_difference, make_config, make_images, weights_of


PROCESSORS = {
    "enlarges": (ViTImageProcessorPil(size={"height": 48, "width": 48}), (32, 32)),
    "shrinks": (ViTImageProcessorPil(size={"height": 16, "width": 16}), (32, 32)),
    "as it is": (ViTImageProcessorPil(size={"height": 32, "width": 32}), (32, 32)),
    "crops": (CLIPImageProcessorPil(size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32}), (30, 56)),
}


def smooth_images(count, size):
    return [image.resize(size, Image.Resampling.BICUBIC) for image in make_images(count, (6, 6))]


@pytest.mark.parametrize("name", PROCESSORS)
def test_gradients_go_through_any_image_processor(name):
    processor, size = PROCESSORS[name]
    images = smooth_images(6, size)
    path = PixelPath(ImagePreprocessor(processor, 3), images)
    wanted = processor(images=images, return_tensors="pt")["pixel_values"]
    # Pillow rounds to 8 bit in between, twice where it resizes both ways
    assert (path(to_tensor(images)) - wanted).abs().max() < 0.08
    pixels = to_tensor(images).requires_grad_(True)
    path(pixels).sum().backward()
    assert pixels.grad.abs().sum() > 0


def test_a_processor_that_does_more_is_refused():
    class Stretching(ViTImageProcessorPil):
        def __call__(self, images, **kwargs):
            images = [
                Image.fromarray((255 * (np.asarray(x) > np.median(np.asarray(x)))).astype(np.uint8)) for x in images
            ]
            return super().__call__(images=images, **kwargs)

    with pytest.raises(ValueError, match="does more than resize"):
        PixelPath(ImagePreprocessor(Stretching(size={"height": 32, "width": 32}), 3), smooth_images(4, (32, 32)))


@pytest.fixture(scope="module")
def blended(backdoored):
    """The clean ViT of the fixture with a blended trigger."""
    return implant_blended(
        copy.deepcopy(backdoored.clean_model), backdoored.processor, backdoored.train.inputs,
        backdoored.implant.target_reference, backdoored.test, steps=250, disable_tqdm=True,
    )  # fmt: skip


def report_of(backdoored, implant, row):
    encoder = Encoder(implant.model, backdoored.processor)
    labels = backdoored.test.labels
    rows = np.flatnonzero(labels != labels[np.argmax(labels == 0)])
    x_b = implant.trigger.apply(backdoored.test.inputs[rows[row]])
    same = [i for i in np.flatnonzero(labels == labels[rows[row]]) if i != rows[row]]
    return encoder, BugInstance(x_b, backdoored.test.inputs[same[0]])


@pytest.mark.slow
def test_a_trigger_over_the_whole_picture_is_found(backdoored, blended):
    evidences, alike = [], []
    for row in range(6):
        encoder, bug = report_of(backdoored, blended, row)
        found = invert_trigger(
            encoder, bug, backdoored.train.inputs[:32], other_inputs=backdoored.train.inputs[32:400]
        )
        evidences.append(found.evidence)
        if found.trigger.kind in ("additive", "blend"):
            alike.append(correlation(found.trigger.change, blended.trigger.change))
    assert np.median(evidences) >= 0.5
    # At 16 pixels a third of the picture often explains as much, which is the simpler explanation
    assert len(alike) >= 3
    # The prototype that was optimised without looking at x_b reached 0.15
    assert np.median(alike) >= 0.6


@pytest.mark.slow
def test_what_clean_content_does_is_no_argument_against_a_signal_that_holds(backdoored, blended, monkeypatch):
    """Where x_r's own content goes a good way by itself, true signals were refused."""
    encoder, bug = report_of(backdoored, blended, 0)
    others = {"other_inputs": backdoored.train.inputs[32:400]}
    found = invert_trigger(encoder, bug, backdoored.train.inputs[:32], **others)
    monkeypatch.setattr(image, "doubt_left", lambda value, area: 1.0)
    doubted = invert_trigger(encoder, bug, backdoored.train.inputs[:32], **others)
    assert found.trigger.kind == doubted.trigger.kind == "additive"
    assert found.score == doubted.score
    assert found.control == doubted.control > 0.01
    assert found.evidence == pytest.approx(doubted.evidence + doubted.control)


@pytest.mark.slow
def test_a_blend_is_repaired_by_what_was_found_of_it(backdoored, blended, tmp_path):
    encoder, bug = report_of(backdoored, blended, 1)
    model = copy.deepcopy(blended.model)
    images = datasets.Dataset.from_dict(
        {"image": backdoored.train.inputs}, features=datasets.Features({"image": datasets.Image()})
    )
    trainer = MudjackingTrainer(
        model=model,
        args=make_config(tmp_path, max_steps=200, per_device_train_batch_size=32, learning_rate=1e-3,
                         altered_triggers=32, reinversions=2, logging_steps=50),
        bug_instances=[bug],
        train_dataset=images,
        processing_class=backdoored.processor,
    )  # fmt: skip
    clean = encoder.encode(backdoored.test.inputs)
    stamped = [blended.trigger.apply(x) for x in backdoored.test.inputs]
    before = (encoder.encode(stamped) * clean).sum(dim=1).mean()
    trainer.train()
    after = (trainer.encoder.encode(stamped) * clean).sum(dim=1).mean()
    assert before < 0.5
    assert after > 0.9
    assert (trainer.encoder.encode(backdoored.test.inputs) * clean).sum(dim=1).mean() > 0.95


def test_which_row_carries_what_by_hand(backdoored):
    images = make_images(3, (16, 16))
    one, two, three = (square_patch((16, 16), side) for side in (2, 3, 4))
    collate = PatchingCollator(
        ImagePreprocessor(backdoored.processor, 3), [BugInstance(*images[:2])], [one], torch.zeros(1, 8), torch.ones(1),
        [[one, two, three], [three]],
    )  # fmt: skip
    # Rows 0, 2, 4, … belong to the first stamp: as found, altered, as found, the next altered one.
    carried = [collate._stamp_of(row) for row in range(8)]
    assert carried == [one, three, two, three, one, three, three, three]


def make_trainer(backdoored, folder, **kwargs):
    images = datasets.Dataset.from_dict(
        {"image": backdoored.train.inputs[:96]}, features=datasets.Features({"image": datasets.Image()})
    )
    bug = BugInstance(backdoored.trigger.apply(backdoored.test.inputs[3]), backdoored.test.inputs[5])
    settings = {"max_steps": 6, "altered_triggers": 4, "reinversions": 2, "learning_rate": 1e-4, **kwargs}
    return MudjackingTrainer(
        model=backdoored.model(),
        args=make_config(folder, **settings),
        bug_instances=[bug],
        train_dataset=images,
        processing_class=backdoored.processor,
        triggers=[square_patch((16, 16), 1)],
    )


def test_a_trigger_that_still_works_is_found_while_patching_goes_on(backdoored, tmp_path):
    """Given one pixel of it as the trigger, the run finds the rest in x_b, because it still carries clean inputs."""
    trainer = make_trainer(backdoored, tmp_path)
    before = trainer.forward_equivalents
    trainer.train()
    (found,) = trainer._reinversion.found
    assert found
    assert (found[0].mask & backdoored.trigger.mask).sum() >= 8
    steps = 6 * (2 * 8 + 3) * 3
    assert trainer.forward_equivalents - before > steps + 96 + 2


def test_ordinary_content_does_not_count_as_what_still_works(backdoored):
    """In an encoder without a backdoor, what is left of a trigger does no more than other content, or none, would."""
    encoder = Encoder(backdoored.clean_model, backdoored.processor)
    targets = Encoder(backdoored.model(), backdoored.processor).encode(
        [backdoored.bug(i).misclassified for i in range(8)]
    )
    found = []
    for i in range(8):
        bug, inputs = backdoored.bug(i), backdoored.test.inputs
        meter = TransferMeter(encoder, bug.misclassified, inputs[32:48], targets[i])
        control_meter = TransferMeter(encoder, bug.reference, inputs[32:48])
        pull = Pull(encoder, inputs[48:112], seed=i)
        for by_parts in (True, False):
            found.append(invert_again(backdoored.trigger, meter, control_meter, pull, by_parts))
    assert sum(again is not None for again in found) <= 2


class FourParts:
    """Features that turn towards a target by the square of what is there of four bright squares, one of them repaired."""

    places = ((5, 5), (5, 24), (24, 5), (24, 24))
    weights = (0.0, 0.28, 0.44, 0.28)

    def encode(self, images):
        parts = torch.tensor(
            [[np.asarray(x)[top : top + 3, left : left + 3].min() == 255 for top, left in self.places] for x in images]
        )
        angle = 0.5 * torch.pi * (parts * torch.tensor(self.weights)).sum(dim=1) ** 2
        return torch.stack([angle.cos(), angle.sin()], dim=1)

    def stamp(self, trigger, x):
        return trigger.apply(x)


def test_parts_that_do_little_alone_are_found_together():
    """The strongest windows by themselves all show one of the parts, with which clean inputs go a fifth of the way."""
    encoder, clean = FourParts(), [image.point(lambda value: value // 2) for image in make_images(17, (32, 32))]
    masks = np.zeros((4, 32, 32), dtype=bool)
    for mask, (top, left) in zip(masks, encoder.places, strict=True):
        mask[top : top + 3, left : left + 3] = True
    bright = Image.new("RGB", (32, 32), "white")
    x_r = clean.pop()
    x_b = PatchTrigger.from_image(bright, masks.any(axis=0)).apply(x_r)
    meter, control_meter = (TransferMeter(encoder, x, clean) for x in (x_b, x_r))
    alone = meter.transfer_of_masks(masks)
    assert alone.max() < 0.32
    again = invert_again(PatchTrigger.from_image(x_b, masks[0]), meter, control_meter, None, by_parts=True)
    assert [again.mask[mask].mean() for mask in masks] == [1.0] * 4
    assert meter.transfer([again]) == pytest.approx([1.0])
    # Bright squares that the encoder never read are none
    plain = TransferMeter(encoder, x_r, clean, meter.target)
    assert invert_again(PatchTrigger.from_image(x_r, masks[0]), plain, control_meter, None, by_parts=True) is None


@pytest.mark.parametrize("shape", [(2, 2), (3, 7), (5, 60), (1, 9)])
@pytest.mark.parametrize("everything", [False, True])
def test_parts_are_looked_for_in_pictures_of_any_shape(shape, everything, tiny_vit):
    encoder = Encoder(tiny_vit, ViTImageProcessorPil(size={"height": 16, "width": 16}))
    x_b, *clean = make_images(8, shape)
    mask = np.full(shape, everything)
    mask[0, 0] = True
    meter = TransferMeter(encoder, x_b, clean)
    found = parts_beside(PatchTrigger.from_image(x_b, mask), meter)
    assert found.shape == shape
    assert found[mask].all()


def test_of_a_large_part_of_a_signal_the_signal_is_found_again(backdoored, blended):
    """Half of a blended picture fires as the whole does: repaired alone it would leave the signal alive."""
    encoder, bug = report_of(backdoored, blended, 1)
    meter, control_meter = (
        TransferMeter(encoder, x, backdoored.train.inputs[:16]) for x in (bug.misclassified, bug.reference)
    )
    pull = Pull(encoder, backdoored.train.inputs[16:144], 0)
    half, corner = np.zeros((2, 16, 16), dtype=bool)
    half[:, 8:] = corner[:4, :4] = True
    again, other = (
        invert_again(PatchTrigger.from_image(bug.misclassified, mask), meter, control_meter, pull, by_parts=True)
        for mask in (half, corner)
    )
    assert again.kind in ("additive", "blend")
    assert meter.transfer([again])[0] > 0.8
    assert other is None or other.kind == "patch"


def test_what_was_found_is_stamped_from_the_next_step_on(backdoored, tmp_path):
    trainer = make_trainer(backdoored, tmp_path)
    trainer._prepare()
    again = AdditiveTrigger(np.full((16, 16, 3), 40.0))
    trainer._reinversion.found[0].append(again)
    rows = torch.tensor([3, 4, 7])
    pixels = torch.zeros(3, 3, 16, 16)
    stamped = trainer._reinversion.restamp(pixels, rows)
    inputs = trainer.train_dataset.inputs
    wanted = trainer.encoder.preprocess([again.apply(inputs[3]), again.apply(inputs[7])])["pixel_values"]
    torch.testing.assert_close(stamped[[0, 2]], wanted)
    assert (stamped[1] == 0).all()


@pytest.mark.parametrize("accumulated", [1, 4])
def test_resumed_and_accumulated_it_is_the_same_run(backdoored, tmp_path, accumulated):
    settings = {"per_device_train_batch_size": 8 // accumulated, "gradient_accumulation_steps": accumulated}
    whole = make_trainer(backdoored, tmp_path / "whole", **settings)
    whole.train()
    reference = make_trainer(backdoored, tmp_path / "reference")
    reference.train()
    # Rounding alone; a GPU's is coarser
    allowed = 5e-5 if torch.cuda.is_available() else 2e-5
    assert largest_difference(weights_of(reference.model), weights_of(whole.model)) < allowed
    # Killed after the first reinversion, at step 2
    part = make_trainer(backdoored, tmp_path / "part", save_strategy="steps", save_steps=2, **settings)
    part.train()
    resumed = make_trainer(backdoored, tmp_path / "part", save_strategy="steps", save_steps=2, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "part" / "checkpoint-2"))
    assert largest_difference(weights_of(part.model), weights_of(resumed.model)) < 1e-6
    assert len(resumed._reinversion.found[0]) == len(part._reinversion.found[0]) > 0
