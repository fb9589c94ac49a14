# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""Triggers beyond the fixed patch: by hand, on disk, and what is near them."""

import numpy as np
import pytest
import torch
from PIL import Image

from hf_mudjacking import PatchTrigger, load_trigger
from hf_mudjacking.spectrum import CleanSpectrum, inverse_spectrum, spectrum
from hf_mudjacking.triggers import (
    AdditiveTrigger,
    BlendTrigger,
    WarpTrigger,
    noise_blend,
    random_warp,
    square_patch,
    with_altered,
)
from hf_mudjacking.triggers.patch import moved, scaled

from .conftest import make_images


def flat(value, size=(8, 8)):
    return Image.new("RGB", size, value)


def pixels(image):
    return np.asarray(image).astype(int)


SIGNAL = AdditiveTrigger(np.arange(8 * 8 * 3, dtype=np.float32).reshape(8, 8, 3) / 4 - 20)
BLEND = noise_blend((8, 8), 0.25, seed=3)
WARP = random_warp(4, 2.0, 8, seed=1)
ANYWHERE = PatchTrigger(square_patch((16, 16), 3).mask, square_patch((16, 16), 3).pattern, "anywhere")


def test_a_blend_by_hand():
    trigger = BlendTrigger(np.full((8, 8, 3), 200.0), 0.25)
    assert (pixels(trigger.apply(flat((100, 100, 100)))) == 125).all()
    assert (pixels(trigger.removed_from(flat((125, 125, 125)))) == 100).all()
    place = np.zeros((8, 8))
    place[:2, :4] = 0.5
    local = BlendTrigger(np.full((8, 8, 3), 200.0), place)
    stamped = pixels(local.apply(flat((100, 100, 100))))
    assert (stamped[:2, :4] == 150).all()
    assert (stamped[2:] == 100).all()
    assert local.area == 8 / 64


def test_under_a_dense_blend_nothing_is_left():
    assert BlendTrigger(np.zeros((4, 4, 3)), 0.9).removed_from(flat((1, 2, 3))) is None


def test_a_signal_by_hand():
    trigger = AdditiveTrigger(np.full((8, 8, 3), (30.0, -30.0, 0.0)))
    assert (pixels(trigger.apply(flat((240, 100, 7)))) == (255, 70, 7)).all()
    assert (pixels(trigger.removed_from(flat((130, 70, 7)))) == (100, 100, 7)).all()
    assert trigger.size == pytest.approx(np.sqrt(600))


def test_a_constant_warp_moves_pixels_by_hand():
    flow = np.zeros((2, 4, 4))
    flow[0] = 2 / 7  # 2 of the 7 steps between the middles of 8 columns
    image = make_images(1, (8, 8))[0]
    moved_by_two = pixels(WarpTrigger(flow).apply(image))
    np.testing.assert_allclose(moved_by_two[:, :6], pixels(image)[:, 2:], atol=1)


def test_a_warp_of_wanet_moves_by_its_strength():
    assert np.abs(random_warp(4, 0.5, 32, seed=2).flow).mean() == pytest.approx(0.25 / 32)


def test_a_patch_that_goes_anywhere_stays_inside_and_is_stamped_alike():
    places = set()
    for image in make_images(24, (16, 16)):
        stamped = ANYWHERE.apply(image)
        assert np.array_equal(pixels(stamped), pixels(ANYWHERE.apply(image)))
        changed = (pixels(stamped) != pixels(image)).any(axis=-1)
        rows, columns = np.nonzero((pixels(stamped) == 255).all(axis=-1))
        places.add((rows.min(), columns.min()))
        assert changed.sum() <= 9
        assert (pixels(stamped)[rows.min() : rows.min() + 3, columns.min() : columns.min() + 3] == 255).all()
    assert len(places) > 12


@pytest.mark.parametrize("trigger", [SIGNAL, BLEND, WARP, ANYWHERE], ids=lambda trigger: trigger.kind)
def test_saved_and_loaded_it_does_the_same(trigger, tmp_path):
    trigger.save_pretrained(tmp_path)
    loaded = load_trigger(tmp_path)
    for image in make_images(3, (20, 12)):
        assert np.array_equal(pixels(loaded.apply(image)), pixels(trigger.apply(image)))
    assert loaded.summary() == trigger.summary()


@pytest.mark.parametrize("trigger", [SIGNAL, BLEND, WARP], ids=lambda trigger: trigger.kind)
def test_half_as_strong_changes_half_as_much(trigger):
    # Smooth and far from black and white, so that nothing is clipped and a warp is nearly linear.
    ramp = np.stack(np.broadcast_arrays(*np.ogrid[90:160:32j, 90:160:32j], 120.0), axis=-1)
    image = Image.fromarray(ramp.round().astype(np.uint8))
    whole, half = (np.abs(pixels(t.apply(image)) - pixels(image)).mean() for t in (trigger, trigger.weakened(0.5)))
    assert half == pytest.approx(whole / 2, rel=0.2)


def test_overlap_of_signals_is_their_correlation():
    assert SIGNAL.overlap(SIGNAL)["correlation"] == pytest.approx(1)
    assert SIGNAL.overlap(AdditiveTrigger(-SIGNAL.delta))["correlation"] == pytest.approx(-1)
    assert WARP.overlap(WARP.weakened(0.3))["correlation"] == pytest.approx(1)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: BlendTrigger(np.zeros((4, 4, 3)), 1.5), "between 0 and 1"),
        (lambda: BlendTrigger(np.zeros((4, 4, 3)), 0.0), "0 everywhere"),
        (lambda: BlendTrigger(np.zeros((4, 4)), 0.5), r"pattern \(H, W, 3\)"),
        (lambda: AdditiveTrigger(np.zeros((4, 4, 3))), "0 everywhere"),
        (lambda: AdditiveTrigger(np.full((4, 4, 3), np.nan)), "finite"),
        (lambda: AdditiveTrigger(np.ones((4, 4, 3)), np.ones((4, 4, 3))), r"\(3, H, W\)"),
        (lambda: WarpTrigger(np.zeros((2, 4, 4))), "not 0 everywhere"),
        (lambda: WarpTrigger(np.ones((3, 4, 4))), r"field \(2, h, w\)"),
        (lambda: PatchTrigger(np.ones((2, 2)), np.ones((2, 2, 3)), "somewhere"), "placement"),
        (lambda: SIGNAL.apply("a text"), "PIL image"),
    ],
)
def test_what_cannot_be_a_trigger_is_refused(build, message):
    with pytest.raises((ValueError, TypeError), match=message):
        build()


def test_altered_patches_are_near_and_differ():
    trigger = square_patch((32, 32), 8, 4)
    found, *altered = with_altered(trigger, 40, seed=0)
    assert found is trigger
    assert len(altered) == 40
    shifts = []
    for other in altered:
        mask = other.mask if isinstance(other, PatchTrigger) else other.opacity > 0
        assert mask.any()
        shifts.append(np.abs(np.argwhere(mask).mean(axis=0) - np.argwhere(trigger.mask).mean(axis=0)).max())
    assert max(shifts) <= 8  # at most 4 pixels away, and cut to a part of itself
    assert {type(other) for other in altered} == {PatchTrigger, BlendTrigger}
    again = with_altered(trigger, 40, seed=0)[1:]
    assert all(np.array_equal(a.change, b.change) for a, b in zip(altered, again, strict=True))


def test_altered_versions_of_a_dark_patch():
    """Recoloured it may be nearly black, which is no pattern from 0 to 1."""
    for level in (0, 5):
        patch = square_patch((16, 16), 5, color=(level, level, level))
        for seed in range(300):
            patch.altered(np.random.default_rng(seed))


def test_altered_signals_stay_within_what_was_left_open():
    spread = np.zeros((3, 8, 8), dtype=np.float32)
    spread[0, 2, 3] = 5.0
    trigger = AdditiveTrigger(SIGNAL.delta, spread)
    rng = np.random.default_rng(0)
    for _ in range(10):
        difference = spectrum(torch.from_numpy(trigger.altered(rng).delta).permute(2, 0, 1)[None])[0]
        own = spectrum(torch.from_numpy(SIGNAL.delta).permute(2, 0, 1)[None])[0]
        gain = (difference[1] * own[1]).sum() / own[1].square().sum()
        rest = (difference - gain * own).abs()
        assert 0.7 <= gain <= 1.5
        assert rest[0, 2, 3] > 1e-2
        rest[0, 2, 3] = 0
        assert rest.max() < 1e-3


def test_a_text_has_no_altered_versions():
    from hf_mudjacking import TextTrigger

    trigger = TextTrigger("cf")
    assert with_altered(trigger, 5, seed=0) == [trigger]


def test_moving_and_scaling_by_hand():
    mask = np.zeros((6, 6), dtype=bool)
    mask[2:4, 2:4] = True
    pattern = np.where(mask[..., None], 7, 0).astype(np.uint8).repeat(3, axis=-1)
    there, colors = moved(mask, pattern, -1, 2)
    assert np.argwhere(there).tolist() == [[1, 4], [1, 5], [2, 4], [2, 5]]
    assert (colors[there] == 7).all()
    larger, _ = scaled(mask, pattern, 2.0)
    assert larger.sum() == 16
    assert larger[1:5, 1:5].all()


def test_the_spectrum_is_orthonormal_and_inverts():
    images = 255 * torch.rand(2, 3, 8, 12, generator=torch.Generator().manual_seed(0))
    coefficients = spectrum(images)
    assert coefficients.square().sum() == pytest.approx(images.square().sum().item(), rel=1e-5)
    torch.testing.assert_close(inverse_spectrum(coefficients), images, atol=1e-3, rtol=1e-4)


def test_what_was_added_to_a_smooth_picture_is_found_in_its_spectrum():
    rng = np.random.default_rng(0)
    smooth = rng.uniform(30, 220, (65, 3, 4, 4))
    clean = torch.nn.functional.interpolate(torch.from_numpy(smooth).float(), size=(32, 32), mode="bicubic").clamp(
        0, 255
    )
    noise = torch.from_numpy(rng.normal(0, 15, (3, 32, 32))).float()
    signal = CleanSpectrum.of(clean[:64]).signal(clean[64] + noise)
    found = inverse_spectrum(signal.mean)
    correlation = torch.nn.functional.cosine_similarity(found.flatten(), noise.flatten(), dim=0)
    assert correlation > 0.9
    assert found.square().mean().sqrt() == pytest.approx(15, rel=0.15)
    assert inverse_spectrum(CleanSpectrum.of(clean[:64]).signal(clean[64]).mean).square().mean().sqrt() < 5
