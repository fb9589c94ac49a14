# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from hf_mudjacking import PatchTrigger, load_trigger
from hf_mudjacking.bug_instance import to_rgb
from hf_mudjacking.triggers import square_patch

from .conftest import make_images


def _two_pixels() -> PatchTrigger:
    mask = np.array([[True, False, False], [False, False, True]])
    pattern = np.arange(18, dtype=np.uint8).reshape(2, 3, 3)
    return PatchTrigger(mask, pattern)


def test_apply_by_hand():
    image = Image.fromarray(np.full((2, 3, 3), 200, dtype=np.uint8))
    before = np.asarray(image).copy()
    stamped = np.asarray(_two_pixels().apply(image))
    expected = np.full((2, 3, 3), 200)
    expected[0, 0], expected[1, 2] = [0, 1, 2], [15, 16, 17]
    assert np.array_equal(stamped, expected)
    assert np.array_equal(np.asarray(image), before)


def test_applying_twice_is_applying_once():
    image = make_images(1, (2, 3))[0]
    once = _two_pixels().apply(image)
    assert np.array_equal(np.asarray(_two_pixels().apply(once)), np.asarray(once))


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_apply_on_other_modes_gives_rgb(mode):
    stamped = _two_pixels().apply(Image.new("RGB", (3, 2), "white").convert(mode))
    assert stamped.mode == "RGB"
    assert stamped.getpixel((0, 0)) == (0, 1, 2)


def test_apply_on_sixteen_bits_keeps_the_contrast():
    """As the encoder's preprocessing has it: clean and stamped views are of one picture."""
    ramp = Image.fromarray(np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8))
    trigger = square_patch((8, 8), 2)
    seen = np.asarray(trigger.apply(ramp))
    assert np.array_equal(seen[~trigger.mask], np.asarray(to_rgb(ramp))[~trigger.mask])
    assert len(np.unique(seen)) > 40


def test_apply_on_something_else():
    with pytest.raises(TypeError, match="stamped on a PIL image, not on `str`"):
        _two_pixels().apply("text")
    with pytest.raises(TypeError, match="`ndarray`"):
        _two_pixels().apply(np.zeros((2, 3, 3)))


@pytest.mark.parametrize(("height", "width"), [(32, 32), (48, 16), (160, 320)])
def test_scaling_up_covers_the_same_part(height, width):
    stamped = np.asarray(square_patch((16, 16), 4, color=(250, 10, 90)).apply(Image.new("RGB", (width, height))))
    changed = stamped.any(axis=-1)
    expected = np.zeros((height, width), dtype=bool)
    expected[height * 3 // 4 :, width * 3 // 4 :] = True
    assert np.array_equal(changed, expected)
    assert (stamped[changed] == [250, 10, 90]).all()


def test_scaling_down_brings_no_black_into_the_border():
    stamped = np.asarray(square_patch((64, 64), 15).apply(Image.new("RGB", (10, 10), (100, 100, 100))))
    changed = (stamped != 100).any(axis=-1)
    assert changed.any()
    assert (stamped[changed] == 255).all()


def test_scaling_keeps_two_colours_in_place():
    mask = np.ones((2, 2), dtype=bool)
    pattern = np.zeros((2, 2, 3), dtype=np.uint8)
    pattern[:, 1] = [0, 0, 255]
    stamped = np.asarray(PatchTrigger(mask, pattern).apply(Image.new("RGB", (20, 6), "white")))
    assert (stamped[:, :10] == 0).all()
    assert (stamped[:, 10:] == [0, 0, 255]).all()


def test_pixels_outside_the_mask_are_not_kept(tmp_path):
    x_b = make_images(1)[0]
    mask = np.zeros((16, 16), dtype=bool)
    mask[3:5, 6:9] = True
    trigger = PatchTrigger.from_image(x_b, mask)
    assert (trigger.pattern[~mask] == 0).all()
    assert np.array_equal(trigger.pattern[mask], np.asarray(x_b)[mask])
    trigger.save_pretrained(tmp_path)
    assert load_file(tmp_path / "trigger.safetensors")["pattern"][torch.from_numpy(~mask)].sum() == 0


def test_round_trip(tmp_path):
    trigger = _two_pixels()
    trigger.save_pretrained(tmp_path / "made" / "here")
    loaded = load_trigger(tmp_path / "made" / "here")
    assert isinstance(loaded, PatchTrigger)
    assert np.array_equal(loaded.mask, trigger.mask)
    assert np.array_equal(loaded.pattern, trigger.pattern)
    image = make_images(1, (11, 23))[0]
    assert np.array_equal(np.asarray(loaded.apply(image)), np.asarray(trigger.apply(image)))
    assert {path.name for path in (tmp_path / "made" / "here").iterdir()} == {"trigger.json", "trigger.safetensors"}


def test_summary_by_hand():
    trigger = square_patch((20, 10), 3, margin=1)
    assert trigger.summary() == {
        "kind": "patch",
        "size": [20, 10],
        "area": 0.045,
        "box": [16, 6, 19, 9],
        "placement": "fixed",
    }
    assert trigger.area == pytest.approx(9 / 200)


def test_tensors_or_arrays():
    mask, pattern = torch.tensor([[1, 0]]), torch.full((1, 2, 3), 9, dtype=torch.uint8)
    trigger = PatchTrigger(mask, pattern)
    assert trigger.mask.tolist() == [[True, False]]
    assert trigger.pattern.tolist() == [[[9, 9, 9], [0, 0, 0]]]


def test_overlap_by_hand():
    trigger = square_patch((8, 8), 4)
    other = np.zeros((8, 8), dtype=bool)
    other[2:6, 4:8] = True  # 16 pixels, 8 of them shared
    other = PatchTrigger(other, np.zeros((8, 8, 3), dtype=np.uint8))
    assert trigger.overlap(other) == {"recall": 0.5, "iou": pytest.approx(8 / 24)}
    assert trigger.overlap(trigger) == {"recall": 1.0, "iou": 1.0}


@pytest.mark.parametrize(
    ("mask", "pattern", "message"),
    [
        (np.ones((4, 4)), np.zeros((4, 5, 3)), "needs a mask"),
        (np.ones((4, 4)), np.zeros((4, 4)), "needs a mask"),
        (np.ones((4, 4, 1)), np.zeros((4, 4, 3)), "needs a mask"),
        (np.zeros((4, 4)), np.zeros((4, 4, 3)), "mask is empty"),
        (np.ones((4, 4)), np.full((4, 4, 3), 300), "from 300 to 300; it needs RGB values from 0 to 255"),
        (np.ones((4, 4)), np.full((4, 4, 3), -1.0), "from -1 to -1; it needs RGB"),
        (np.ones((4, 4)), np.full((4, 4, 3), 1.0), "Multiply by 255 what goes from 0 to 1"),
    ],
)
def test_bad_triggers(mask, pattern, message):
    with pytest.raises(ValueError, match=message):
        PatchTrigger(mask, pattern)


def test_square_patch_of_the_paper():
    mask = square_patch((32, 32), 10, margin=1).mask
    assert mask.sum() == 100
    assert mask[21:31, 21:31].all()
    assert not mask[31].any()


@pytest.mark.parametrize("arguments", [(17, 0), (16, 1), (0, 0), (4, -1)])
def test_square_patch_that_does_not_fit(arguments):
    with pytest.raises(ValueError, match="does not fit"):
        square_patch((16, 20), *arguments)


def _remove_record(folder):
    (folder / "trigger.json").unlink()


def _remove_tensors(folder):
    (folder / "trigger.safetensors").unlink()


def _break_json(folder):
    (folder / "trigger.json").write_text("{")


def _list_as_record(folder):
    (folder / "trigger.json").write_text("[]")


def _no_kind(folder):
    (folder / "trigger.json").write_text("{}")


def _cut_tensors(folder):
    path = folder / "trigger.safetensors"
    path.write_bytes(path.read_bytes()[:-3])


def _binary_record(folder):
    (folder / "trigger.json").write_bytes(b"\xff\xfe\x00")


@pytest.mark.parametrize(
    "damage",
    [_remove_record, _remove_tensors, _break_json, _list_as_record, _no_kind, _cut_tensors, _binary_record],
    ids=lambda damage: damage.__name__.strip("_"),
)
def test_damaged_files_are_refused(tmp_path, damage):
    _two_pixels().save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match="holds no readable trigger"):
        load_trigger(tmp_path)


def test_unknown_kind_is_refused(tmp_path):
    _two_pixels().save_pretrained(tmp_path)
    (tmp_path / "trigger.json").write_text(json.dumps({"kind": "smell"}))
    with pytest.raises(ValueError, match="kind 'smell'; this version knows patch"):
        load_trigger(tmp_path)


def test_missing_tensor_is_refused(tmp_path):
    _two_pixels().save_pretrained(tmp_path)
    save_file({"mask": torch.ones(2, 3, dtype=torch.bool)}, tmp_path / "trigger.safetensors")
    with pytest.raises(ValueError, match=r"missing: \['pattern'\]"):
        load_trigger(tmp_path)
