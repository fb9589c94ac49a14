# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""Views of pictures, against Pillow, colorsys and values computed by hand."""

import colorsys

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance
from transformers import ViTConfig, ViTModel
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from hf_mudjacking import Encoder
from hf_mudjacking.peers import augmentation
from hf_mudjacking.peers.augmentation import (
    brightness,
    contrast,
    contrastive_view,
    cropped,
    grey,
    hue,
    jittered,
    mirrored,
    official_view,
    saturation,
)
from hf_mudjacking.peers.pictures import ModelPictures
from hf_mudjacking.triggers import square_patch

from .conftest import TINY, make_images


# Pillow rounds, and takes a whole number for the mean.
LEVEL = 1.01 / 255


def to_pictures(images):
    return torch.from_numpy(np.stack([np.asarray(x) for x in images])).permute(0, 3, 1, 2).float() / 255


def gradients(count, size=(12, 10)):
    """Smooth pictures, each another."""
    return [x.resize(size[::-1], Image.Resampling.BICUBIC) for x in make_images(count, (3, 3))]


@pytest.mark.parametrize(
    ("change", "enhancer"),
    [(brightness, ImageEnhance.Brightness), (contrast, ImageEnhance.Contrast), (saturation, ImageEnhance.Color)],
)
def test_light_and_colour_are_those_of_pillow(change, enhancer):
    images, factors = make_images(4), [0.6, 0.87, 1.0, 1.4]
    found = change(to_pictures(images), torch.tensor(factors))
    wanted = to_pictures([enhancer(x).enhance(f) for x, f in zip(images, factors, strict=True)])
    assert (found - wanted).abs().max() <= 2 * LEVEL
    assert (found[0] - to_pictures(images)[0]).abs().max() > 0.05


def test_grey_is_that_of_pillow():
    images = make_images(3)
    wanted = torch.from_numpy(np.stack([np.asarray(x.convert("L")) for x in images])).float() / 255
    assert (grey(to_pictures(images))[:, 0] - wanted).abs().max() <= LEVEL


def test_hue_is_that_of_colorsys():
    images, turns = make_images(3, (5, 4)), [-0.1, 0.04, 0.5]
    pictures = to_pictures(images)
    found = hue(pictures, torch.tensor(turns))
    for picture, turn, turned in zip(pictures, turns, found, strict=True):
        for place in np.ndindex(5, 4):
            h, s, v = colorsys.rgb_to_hsv(*picture[:, place[0], place[1]].tolist())
            wanted = colorsys.hsv_to_rgb((h + turn) % 1, s, v)
            assert turned[:, place[0], place[1]].tolist() == pytest.approx(wanted, abs=1e-5)


def test_hue_by_hand():
    colors = torch.tensor([[1.0, 0, 0], [0.5, 0.5, 0.5], [0, 0, 0], [1, 1, 0]])[:, :, None, None]
    found = hue(colors, torch.full((4,), 1 / 3))[:, :, 0, 0]
    # Red turns green, yellow turns cyan; grey and black have no hue
    assert torch.allclose(found, torch.tensor([[0, 1.0, 0], [0.5, 0.5, 0.5], [0, 0, 0], [0, 1, 1]]), atol=1e-6)


def test_mirrored_changes_the_chosen_alone():
    pictures = to_pictures(make_images(3))
    found = mirrored(pictures, torch.tensor([True, False, True]))
    assert torch.equal(found[1], pictures[1])
    assert torch.equal(found[0], pictures[0].flip(2))


def test_jitter_applies_each_change_once_in_the_drawn_order(monkeypatch):
    images = make_images(64)
    calls = []
    for name in ("brightness", "contrast", "saturation", "hue"):
        original = getattr(augmentation, name)

        def watched(pictures, amounts, name=name, original=original):
            calls.append((name, amounts))
            return original(pictures, amounts)

        monkeypatch.setattr(augmentation, name, watched)
    pictures = to_pictures(images)
    found = jittered(pictures, torch.Generator().manual_seed(3))
    amounts = {name: torch.cat([a for n, a in calls if n == name]) for name, _ in calls}
    kept = [i for i in range(64) if torch.equal(found[i], pictures[i])]
    assert 4 <= len(kept) <= 24  # 12.8 of 64 expected
    for name, (low, high) in {"brightness": (0.6, 1.4), "contrast": (0.6, 1.4), "saturation": (0.6, 1.4), "hue": (-0.1, 0.1)}.items():  # fmt: skip
        assert len(amounts[name]) == 64 - len(kept)
        assert low <= amounts[name].min() < low + 0.2 * (high - low)
        assert high >= amounts[name].max() > high - 0.2 * (high - low)
    # No place in the order belongs to one change
    assert all(len(part) < 64 - len(kept) for _, part in calls)


def test_one_jitter_by_hand(monkeypatch):
    monkeypatch.setattr(augmentation, "_JITTERED", 1.0)
    picture = to_pictures(make_images(1))
    generator = torch.Generator().manual_seed(5)
    found = jittered(picture, generator)
    # The same numbers again, drawn one by one
    generator.manual_seed(5)
    amounts = (2 * torch.rand(1, 4, generator=generator) - 1)[0]
    order = torch.rand(1, 4, generator=generator).argsort(dim=1)[0].tolist()
    wanted = picture
    for number in order:
        amount = amounts[number : number + 1]
        change = (brightness, contrast, saturation, hue)[number]
        wanted = change(wanted, 0.1 * amount if number == 3 else 1 + 0.4 * amount)
    assert torch.allclose(found, wanted, atol=1e-6)


def test_official_views_are_mirrored_or_grey_as_often_as_they_should(monkeypatch):
    monkeypatch.setattr(augmentation, "_JITTERED", 0.0)
    pictures = to_pictures(make_images(1)).expand(1000, -1, -1, -1)
    views = official_view(pictures, torch.Generator().manual_seed(0))
    is_grey = (views[:, 0] == views[:, 1]).flatten(1).all(dim=1)
    plain = grey(pictures)
    is_mirrored = (views == pictures.flip(3)).flatten(1).all(1) | (views == plain.flip(3)).flatten(1).all(1)
    assert float(is_grey.float().mean()) == pytest.approx(0.2, abs=0.04)
    assert float(is_mirrored.float().mean()) == pytest.approx(0.5, abs=0.05)


def test_a_crop_shows_a_part_at_full_size():
    height, width = 24, 16
    down = torch.linspace(0, 1, height)[:, None].expand(height, width)
    across = torch.linspace(0, 1, width)[None].expand(height, width)
    pictures = torch.stack([down, across, torch.zeros_like(down)]).expand(200, -1, -1, -1)
    found = cropped(pictures, torch.Generator().manual_seed(0))
    assert found.shape == pictures.shape
    # What rises over the picture rises in each crop, by its share of the height and width
    high = found[:, 0, -1, 8] - found[:, 0, 0, 8]
    wide = found[:, 1, 12, -1] - found[:, 1, 12, 0]
    area = high * wide
    assert float(area.min()) > 0.15
    assert float(area.max()) <= 1.0 + 1e-5
    assert float(area.mean()) == pytest.approx(0.6, abs=0.08)
    assert found[:, 0].diff(dim=1).min() >= -1e-6


def test_views_depend_on_the_generator_alone():
    pictures = to_pictures(gradients(4))
    first, again, other = (contrastive_view(pictures, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.min() >= 0
    assert first.max() <= 1


def test_a_batch_is_augmented_picture_by_picture():
    pictures = to_pictures(make_images(1)).expand(8, -1, -1, -1)
    views = official_view(pictures, torch.Generator().manual_seed(0))
    assert len({view.numpy().tobytes() for view in views}) > 6


@pytest.mark.parametrize(
    "settings",
    [
        {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.25, 0.3]},
        {"image_mean": [0.0] * 3, "image_std": [1.0] * 3},
    ],
)
def test_the_way_to_the_model_and_back(tiny_vit, settings):
    processor = ViTImageProcessorPil(size={"height": 16, "width": 16}, **settings)
    pictures = ModelPictures(Encoder(tiny_vit, processor))
    images = make_images(3)
    prepared = pictures.prepare(images)
    assert torch.equal(prepared, torch.from_numpy(np.stack([np.asarray(x) for x in images])).permute(0, 3, 1, 2))
    found = pictures.inputs(pictures.shown(prepared))["pixel_values"]
    assert (found - processor(images, return_tensors="pt")["pixel_values"]).abs().max() < 1e-5
    assert pictures.mean_color.tolist() == [round(255 * mean) for mean in settings["image_mean"]]


def test_raw_pictures_are_stamped_before_they_are_resized(tiny_vit):
    processor = ViTImageProcessorPil(size={"height": 16, "width": 16})
    pictures = ModelPictures(Encoder(tiny_vit, processor))
    images, trigger = gradients(2, (40, 32)), square_patch((40, 32), 8)
    stamped = [trigger.apply(x).resize((16, 16), Image.Resampling.BILINEAR) for x in images]
    assert (pictures.prepare(images, trigger).float() / 255 - to_pictures(stamped)).abs().max() <= LEVEL


def test_a_processor_without_colours_is_refused(tiny_vit):
    class Blind(ViTImageProcessorPil):
        def __call__(self, images, **kwargs):
            return {"pixel_values": torch.zeros(len(images), 3, 16, 16)}

    with pytest.raises(ValueError, match="`Blind` gives the same for every colour"):
        ModelPictures(Encoder(tiny_vit, Blind()))


def test_a_model_of_one_channel_sees_grey():
    config = {**TINY, "num_channels": 1}
    processor = ViTImageProcessorPil(do_resize=False, image_mean=[0.5], image_std=[0.5])
    pictures = ModelPictures(Encoder(ViTModel(ViTConfig(**config)), processor))
    images = make_images(2)
    prepared = pictures.prepare(images)
    wanted = torch.from_numpy(np.stack([np.asarray(x.convert("L")) for x in images]))[:, None]
    assert torch.equal(prepared, wanted.expand(-1, 3, -1, -1))
    found = pictures.inputs(pictures.shown(prepared))["pixel_values"]
    assert torch.allclose(found, 2 * wanted.float() / 255 - 1, atol=1e-2)
