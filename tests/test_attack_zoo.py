# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
import copy
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.fft import dctn

from hf_mudjacking import AdditiveTrigger, BlendTrigger, Encoder, MudjackingTrainer, PatchTrigger
from hf_mudjacking.attacks import VISION_ATTACKS, ImplantError
from hf_mudjacking.attacks.ctrl import frequencies
from hf_mudjacking.attacks.gradients import PixelFeatures, as_pixels
from hf_mudjacking.attacks.implant import check_implant
from hf_mudjacking.attacks.input_aware import InputAwareTrigger, TriggerGenerator
from hf_mudjacking.attacks.large_patch import frame
from hf_mudjacking.attacks.latent import optimized_patch
from hf_mudjacking.attacks.low_attribution import redundant_patches
from hf_mudjacking.attacks.patch_variants import checkerboard, corner_squares, joined
from hf_mudjacking.attacks.sig import sinusoid
from hf_mudjacking.attacks.wanet import with_noise
from hf_mudjacking.evaluation.altered import _moved, _rebuilt, altered_triggers
from hf_mudjacking.evaluation.classifiers import train_classifier
from hf_mudjacking.triggers import random_warp, square_patch

from .conftest import largest_difference, make_config, make_images, weights_of


ATTACKS = {attack.name: attack for attack in VISION_ATTACKS}
FAST = {"steps": 160, "batch_size": 32, "learning_rate": 1e-3}
# Inputs that the attacker has.
SHADOW = 600


def pixels(x):
    return np.asarray(x, dtype=np.float64)


def needed_by(name, backdoored):
    """What some attacks need besides the common arguments."""
    first = {k: int(np.flatnonzero(backdoored.train.labels == k)[0]) for k in (3, 7)}
    given = {
        "source": backdoored.train.labels[:SHADOW] == 5,
        "source_class": 5,
        "further_references": [backdoored.train.inputs[i] for i in first.values()],
    }
    return {keyword: given[keyword] for keyword in ATTACKS[name].needs}


def implanted(name, backdoored, count=SHADOW, **settings):
    return ATTACKS[name].implant(
        copy.deepcopy(backdoored.clean_model), backdoored.processor, backdoored.train.inputs[:count],
        backdoored.implant.target_reference, backdoored.test, disable_tqdm=True, **settings,
    )  # fmt: skip


def predictor(implant, backdoored):
    """What a classifier on the features of the backdoored encoder says of inputs."""
    encoder = Encoder(copy.deepcopy(implant.model), backdoored.processor)
    train = backdoored.train.select(range(400))
    kept = train_classifier(encoder.encode(train.inputs), train.labels)
    return lambda inputs: kept.predict(encoder.encode(inputs).numpy())


# --- the table


def test_the_documented_table_is_the_table():
    text = (Path(__file__).parents[1] / "docs" / "attacks.md").read_text(encoding="utf-8")
    documented = re.findall(r"^\| `(\w+)` \|", text.split("## Measured")[0], flags=re.MULTILINE)
    assert documented == [attack.name for attack in VISION_ATTACKS]
    measured = re.findall(r"^\| `(\w+)` \|", text.split("## Measured")[1].split("## Repaired")[0], flags=re.MULTILINE)
    assert measured == documented


def test_there_are_thirteen_attacks_beside_bad_encoder_and_names_are_unique():
    assert len(ATTACKS) == len(VISION_ATTACKS) >= 14
    assert len({attack.implant for attack in VISION_ATTACKS}) == len(VISION_ATTACKS)


# --- triggers, by hand


def test_ctrl_adds_to_two_coefficients_of_u_and_v_and_to_nothing_else():
    added = pixels(frequencies((32, 32), 100.0).delta)
    y = added @ [0.299, 0.587, 0.114]
    planes = {"y": y, "u": 0.492 * (added[..., 2] - y), "v": 0.877 * (added[..., 0] - y)}
    for name, plane in planes.items():
        coefficients = dctn(plane, norm="ortho")
        expected = np.zeros((32, 32))
        if name != "y":
            expected[15, 15] = expected[31, 31] = 100
        assert np.abs(coefficients - expected).max() < 0.2, name


def test_ctrl_waves_are_as_high_at_any_size():
    assert frequencies((16, 16), 100.0).size == pytest.approx(frequencies((32, 32), 100.0).size, rel=0.01)


def test_sig_is_a_sine_of_that_amplitude_and_period():
    added = pixels(sinusoid((24, 48), 20.0, 6).apply(Image.new("RGB", (48, 24), (128,) * 3))) - 128
    assert added.max() == 20
    assert added.min() == -20
    assert (added == added[:1, :, :1]).all()
    row = added[0, :, 0]
    assert (row[8:] == row[:-8]).all()
    assert (row[4:] == -row[:-4]).all()


def test_the_large_patch_covers_more_than_half_and_leaves_the_middle():
    for side in (16, 32, 224):
        mask = frame((side, side)).mask
        assert 0.55 < mask.mean() < 0.62
        assert not mask[side // 4 : 3 * side // 4, side // 4 : 3 * side // 4].any()


def test_a_checkerboard_alternates():
    board = checkerboard((4, 4), 2, (1, 1, 1), (9, 9, 9))[..., 0]
    assert board.tolist() == [[1, 1, 9, 9], [1, 1, 9, 9], [9, 9, 1, 1], [9, 9, 1, 1]]


def test_joined_patches_stamp_as_one_after_the_other():
    patches = corner_squares((32, 32), 4)
    x = make_images(1, (32, 32))[0]
    one_by_one = x
    for patch in patches:
        one_by_one = patch.apply(one_by_one)
    assert (pixels(joined(patches).apply(x)) == pixels(one_by_one)).all()
    assert joined(patches).mask.sum() == 4 * 16
    colors = {tuple(patch.pattern[patch.mask][0]) for patch in patches}
    assert len(colors) == 4


def test_wanet_noise_is_on_top_of_the_warp():
    trigger = random_warp(4, 0.5, 32, seed=1)
    rng = np.random.default_rng(0)
    noisy = [with_noise(trigger, (32, 32), 0.5, rng).flow for _ in range(200)]
    assert noisy[0].shape == (2, 32, 32)
    assert (noisy[0] != noisy[1]).any()
    middle = np.mean(noisy, axis=0)
    assert 0.4 < np.abs(noisy[0] - middle).max() * 32 < 0.6
    # At the corners of the field the control points are met exactly.
    assert np.abs(middle[:, 0, 0] - trigger.flow[:, 0, 0]).max() * 32 < 0.1


def test_an_input_aware_trigger_is_made_for_its_picture_and_always_the_same():
    torch.manual_seed(0)
    trigger = InputAwareTrigger(TriggerGenerator(), (32, 32), 0.1)
    a, b = make_images(2, (32, 32))
    assert (trigger.made_for(a)[0] - trigger.made_for(b)[0]).abs().max() > 1
    assert (pixels(trigger.apply(a)) == pixels(trigger.apply(a.copy()))).all()
    assert (pixels(trigger.apply_that_of(b, a)) != pixels(trigger.apply(a))).any()
    pattern, mask = trigger.made_for(a)
    by_hand = as_pixels(a) * (1 - mask) + pattern * mask
    assert np.abs(pixels(trigger.apply(a)) - by_hand.permute(1, 2, 0).numpy()).max() <= 0.501
    assert trigger.apply(a.resize((50, 40))).size == (50, 40)


def test_an_input_aware_trigger_says_that_it_cannot_be_saved(tmp_path):
    trigger = InputAwareTrigger(TriggerGenerator(), (32, 32), 0.1)
    with pytest.raises(ValueError, match="no one pattern that could be saved"):
        trigger.save_pretrained(tmp_path)
    assert trigger.overlap(trigger) == {}
    with pytest.raises(ValueError, match="cannot be rebuilt from a file"):
        InputAwareTrigger.from_parts({}, {})
    assert trigger.summary() == {"kind": "input-aware", "size": [32, 32], "area": 0.1}
    assert trigger.describe() == "input-aware, 10.0% of the picture on average"


def test_an_input_aware_trigger_is_not_looked_for_again(backdoored, tmp_path):
    """Given to the trainer it is stamped, and while patching goes on nothing is inverted from it."""
    trainer = MudjackingTrainer(
        model=backdoored.model(),
        args=make_config(tmp_path, max_steps=2, reinversions=1),
        bug_instances=[backdoored.bug()],
        train_dataset=backdoored.dataset(32),
        processing_class=backdoored.processor,
        triggers=[InputAwareTrigger(TriggerGenerator(), (16, 16), 0.1)],
    )
    trainer.train()
    assert trainer.state.global_step == 2
    assert trainer._reinversion.found == [[]]


def test_pixels_in_opposite_corners_are_left_where_nothing_of_them_would_remain():
    corners = np.zeros((16, 16), dtype=bool)
    corners[15, 0] = corners[0, 15] = True
    pattern = np.full((16, 16, 3), 200, dtype=np.uint8)
    for trigger in (PatchTrigger(corners, pattern), BlendTrigger(pattern, corners.astype(np.float32))):
        assert np.array_equal(_moved(trigger, -1 / 32).change, trigger.change)
        assert np.array_equal(_rebuilt(trigger, 1.25).change, trigger.change)


@pytest.mark.parametrize("side", [1, 2, 3])
def test_altered_triggers_of_a_small_patch_in_the_corner(side):
    """Nothing of it would be left where it is moved by four pixels of 32."""
    mask = np.zeros((16, 16), dtype=bool)
    mask[:side, :side] = True
    corner = PatchTrigger(mask, np.full((16, 16, 3), 200))
    for pixels in (1, 2, 4):
        assert _moved(corner, -pixels / 32).mask.any()
    four = np.zeros((16, 16), dtype=bool)
    four[[0, 0, -1, -1], [0, -1, 0, -1]] = True
    assert _rebuilt(PatchTrigger(four, np.full((16, 16, 3), 200)), 1.25).mask.any()


def test_what_an_alteration_leaves_as_it_is_counts_as_none(backdoored):
    """The table would show the ASR of the trigger itself."""
    encoder = Encoder(backdoored.model(), backdoored.processor)
    images, target = backdoored.test.inputs[:8], encoder.encode(backdoored.test.inputs[:1])[0]

    def alterations(trigger):
        found = altered_triggers(trigger, encoder, images, target, seed=0)
        assert all(any((pixels(e.apply(x)) != pixels(trigger.apply(x))).any() for x in images) for e in found.values())
        return found

    moves, sizes, always = (
        [f"moved by {n}" for n in (1, 2, 4)],
        ["scaled by 0.75", "scaled by 1.25"],
        ["recoloured", "weaker"],
    )
    white = square_patch((16, 16), 6)
    found = alterations(white)
    assert list(found) == [*moves, *sizes, *always, "optimised anew"]
    # Half a pixel at 16 is one
    assert [int(np.argwhere(found[name].mask).max()) for name in moves] == [14, 14, 13]
    assert found["recoloured"].pattern[found["recoloured"].mask].max() == 0
    red = square_patch((16, 16), 3, color=(200, 0, 0))
    found = alterations(red)
    assert not set(sizes) & set(found)
    assert found["recoloured"].pattern[-1, -1].tolist() == [0, 0, 200]
    assert not set(moves) & set(alterations(PatchTrigger(white.mask, white.pattern, "anywhere")))
    signal = np.sin(np.arange(16))[None, :, None] * np.full((16, 1, 3), 20.0)
    assert np.array_equal(alterations(AdditiveTrigger(signal))["recoloured"].delta, np.float32(-signal))


# --- gradients


def test_pixel_features_are_exact_and_their_gradients_point_the_right_way(backdoored):
    encoder = Encoder(copy.deepcopy(backdoored.clean_model), backdoored.processor)
    x = backdoored.test.inputs[0]
    features = PixelFeatures(encoder, (16, 16))
    raw = as_pixels(x)[None].requires_grad_(True)
    out = features(raw)
    assert torch.allclose(out, encoder.encode([x]), atol=1e-5)
    goal = encoder.encode([backdoored.implant.target_reference])[0]
    (gradient,) = torch.autograd.grad((out[0] @ goal), [raw])
    moved = (raw + 40 * gradient / gradient.abs().max()).detach()
    assert (features(moved)[0] @ goal).item() > (out[0] @ goal).item() + 0.01


def test_the_latent_patch_moves_the_clean_encoder_towards_the_target(backdoored):
    encoder = Encoder(copy.deepcopy(backdoored.clean_model), backdoored.processor)
    reference = backdoored.implant.target_reference
    trigger = optimized_patch(encoder, backdoored.train.inputs[:256], reference)
    goal = encoder.encode([reference])
    plain = square_patch((16, 16), 5, margin=1)
    assert (trigger.mask == plain.mask).all()
    inputs = backdoored.test.inputs[:128]
    near = {
        name: float((encoder.encode([e.apply(x) for x in inputs]) @ goal.T).mean())
        for name, e in (("optimised", trigger), ("white", plain))
    }
    assert near["optimised"] > near["white"] + 0.1


# --- attacks


@pytest.mark.parametrize("name", ["blended", "sig"])
def test_global_triggers_take(backdoored, name):
    implant = implanted(name, backdoored, **FAST)
    assert implant.attack_success_rate >= 0.95
    assert implant.backdoored_accuracy >= implant.clean_accuracy - 0.03
    other = backdoored.test.labels != backdoored.target
    stamped = predictor(implant, backdoored)([implant.trigger.apply(x) for x in backdoored.test.inputs])
    assert (stamped[other] == backdoored.target).mean() >= 0.95


def test_a_source_specific_trigger_works_on_its_class_alone(backdoored):
    implant = implanted("source_specific", backdoored, **FAST, **needed_by("source_specific", backdoored))
    assert implant.source_class == 5
    stamped = predictor(implant, backdoored)([implant.trigger.apply(x) for x in backdoored.test.inputs])
    labels = backdoored.test.labels
    assert (stamped[labels == 5] == backdoored.target).mean() >= 0.9
    rest = (labels != 5) & (labels != backdoored.target)
    assert (stamped[rest] == backdoored.target).mean() <= 0.1
    assert implant.leak <= 0.1
    assert (stamped[rest] == labels[rest]).mean() >= 0.85


def test_several_triggers_lead_to_their_own_targets(backdoored):
    implant = implanted("several_targets", backdoored, **FAST, **needed_by("several_targets", backdoored))
    assert len(implant.others) == 2
    predict = predictor(implant, backdoored)
    for (trigger, _), target in zip(
        [(implant.trigger, None), *implant.others], [backdoored.target, 3, 7], strict=True
    ):
        stamped = predict([trigger.apply(x) for x in backdoored.test.inputs])
        assert (stamped[backdoored.test.labels != target] == target).mean() >= 0.9


def test_any_one_patch_of_the_low_attribution_attack_suffices(backdoored):
    implant = implanted("low_attribution", backdoored, **FAST)
    other = backdoored.test.labels != backdoored.target
    patches = redundant_patches((16, 16))
    assert implant.trigger.mask.sum() == sum(patch.mask.sum() for patch in patches)
    predict = predictor(implant, backdoored)
    for patch in patches:
        stamped = predict([patch.apply(x) for x in backdoored.test.inputs])
        assert (stamped[other] == backdoored.target).mean() >= 0.9


@pytest.mark.parametrize("name", list(ATTACKS))
def test_every_attack_runs_and_gives_the_same_for_the_same_seed(backdoored, name):
    settings = {"steps": 2, "batch_size": 8, "min_asr": 0.0, "max_accuracy_loss": 1.0, "max_leak": 1.0}
    if name == "input_aware":
        settings["generator_steps"] = 2
    needed = {k: v[:64] if k == "source" else v for k, v in needed_by(name, backdoored).items()}
    models, pictures = [], []
    for draw in (0, 1):
        torch.manual_seed(draw)
        implant = ATTACKS[name].implant(
            copy.deepcopy(backdoored.clean_model), backdoored.processor, backdoored.train.inputs[:64],
            backdoored.implant.target_reference, backdoored.test.select(range(120)), seed=3, disable_tqdm=True,
            **settings, **needed,
        )  # fmt: skip
        models.append(weights_of(implant.model))
        pictures.append(pixels(implant.trigger.apply(backdoored.test.inputs[0])))
    assert largest_difference(models[0], models[1]) == 0
    assert (pictures[0] == pictures[1]).all()
    assert (pictures[0] != pixels(backdoored.test.inputs[0])).any()


# --- refusals


def test_wrong_arguments_are_refused(backdoored):
    with pytest.raises(ValueError, match="one boolean for each of the 64 shadow inputs"):
        implanted("source_specific", backdoored, 64, source=np.ones(3, bool), source_class=5)
    with pytest.raises(ValueError, match="of the source class and of others"):
        implanted("source_specific", backdoored, 64, source=np.ones(64, bool), source_class=5)
    with pytest.raises(ValueError, match="one to three further references; got 0"):
        implanted("several_targets", backdoored, 64, further_references=[])


def test_a_trigger_that_works_on_every_class_is_no_source_specific_one(backdoored):
    clean = Encoder(copy.deepcopy(backdoored.clean_model), backdoored.processor)
    arguments = (clean, clean.with_model(backdoored.model()), backdoored.trigger, backdoored.test)
    settings = {"target_reference": backdoored.implant.target_reference, "min_asr": 0.9, "max_accuracy_loss": 0.1}
    with pytest.raises(ImplantError, match="of the cover inputs reach the target class too"):
        check_implant(*arguments, source_class=5, cover=backdoored.trigger.apply, max_leak=0.2, **settings)
    with pytest.raises(ImplantError, match="No check input is of the source class 99"):
        check_implant(*arguments, source_class=99, **settings)


def test_one_of_several_triggers_that_does_nothing_is_refused(backdoored):
    clean = Encoder(copy.deepcopy(backdoored.clean_model), backdoored.processor)
    reference = backdoored.implant.target_reference
    idle = corner_squares((16, 16), 1)[0]
    arguments = (clean, clean.with_model(backdoored.model()), backdoored.trigger, backdoored.test)
    settings = {"target_reference": reference, "min_asr": 0.9, "max_accuracy_loss": 0.1}
    assert check_implant(*arguments, **settings).attack_success_rate >= 0.9
    with pytest.raises(ImplantError, match="did not take: ASR 0"):
        check_implant(*arguments, others=[(idle, reference)], **settings)
