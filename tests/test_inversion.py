# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tqdm import tqdm
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from hf_mudjacking import BugInstance, Encoder, PatchTrigger, invert_trigger
from hf_mudjacking.attacks.large_patch import frame
from hf_mudjacking.inversion import growth, patch_search
from hf_mudjacking.inversion.attribution import (
    FULL_SCAN,
    QUICK_SCAN,
    coarse_to_fine,
    occlusion_map,
    suspicious_box,
    window_sizes,
)
from hf_mudjacking.inversion.growth import grow, grow_on, is_squared_off, odd, purify, squared_off, without_spurs
from hf_mudjacking.inversion.image import of_its_class
from hf_mudjacking.inversion.minimum_cut import best_region
from hf_mudjacking.inversion.patch_search import _Part, _PatchSearch, find_patch
from hf_mudjacking.inversion.splitting import apart, candidate_masks, distinct, heaviest_piece, two_clusters
from hf_mudjacking.inversion.verification import TransferMeter
from hf_mudjacking.triggers import square_patch

from .conftest import make_images


class ColorEncoder:
    """Stands in for an encoder: the feature is the normalised mean colour of an image."""

    def __init__(self):
        self.seen = 0

    def stamp(self, trigger, x):
        return trigger.apply(x)

    def encode(self, images):
        images = list(images)
        self.seen += len(images)
        colors = np.stack([np.asarray(image, dtype=np.float32).reshape(-1, 3).mean(0) for image in images])
        return torch.nn.functional.normalize(torch.from_numpy(colors), dim=1)


def _plain(color, size=(4, 4)):
    return Image.new("RGB", size, color)


# ---- Attribution ----


def test_occlusion_map_by_hand():
    """The score is one pixel; only windows that cover it let it fall."""
    image = np.zeros((4, 4, 3), dtype=np.uint8)
    image[1, 1] = 200
    score = lambda batch: torch.from_numpy(batch[:, 1, 1, 0] / 200)  # noqa: E731
    found = occlusion_map(score, image, np.zeros_like(image), (2, 2))
    # Nine 2×2 windows with stride 1, four of them cover (1, 1). Pixel (0, 0) lies under one window, which covers it;
    # (0, 1) under two, both cover it; (0, 2) under two, one does; (2, 2) under four, one does; the last row under none.
    expected = [[1, 1, 0.5, 0], [1, 1, 0.5, 0], [0.5, 0.5, 0.25, 0], [0, 0, 0, 0]]
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_occlusion_fills_with_the_baseline():
    image, baseline = np.full((4, 4, 3), 10, dtype=np.uint8), np.full((4, 4, 3), 77, dtype=np.uint8)
    batches = []

    def score(batch):
        batches.append(batch)
        return torch.zeros(len(batch))

    occlusion_map(score, image, baseline, (2, 4))
    images = np.concatenate(batches)
    assert images.dtype == np.uint8
    assert sorted((x == 77).all(-1).sum() for x in images) == [0, 8, 8, 8]
    assert set(np.unique(images)) == {10, 77}


@pytest.mark.parametrize("size", [(16, 16), (32, 32), (96, 64), (224, 224)])
def test_attribution_costs_hundreds_of_forwards_at_any_size(size):
    seen = 0

    def score(batch):
        nonlocal seen
        seen += len(batch)
        return torch.zeros(len(batch))

    image = np.zeros((*size, 3), dtype=np.uint8)
    for window in window_sizes(*size, FULL_SCAN.shares):
        occlusion_map(score, image, image, window)
    assert 100 < seen < 600


def test_windows():
    assert window_sizes(32, 32, FULL_SCAN.shares) == [(4, 4), (6, 6), (8, 8), (12, 12), (16, 16)]
    assert window_sizes(224, 224, QUICK_SCAN.shares) == [(28, 28), (56, 56), (112, 112)]
    assert window_sizes(8, 8, FULL_SCAN.shares) == [(2, 2), (3, 3), (4, 4)]
    assert window_sizes(64, 32, (1 / 4, 3 / 8)) == [(16, 8), (24, 12)]
    assert all(a >= 2 and b >= 2 for a, b in window_sizes(3, 200, FULL_SCAN.shares))


# ---- Splitting ----


def test_two_clusters_by_hand():
    scores = np.array([[0.1, 0.2, 5.0], [0.0, 4.8, 0.15]])
    assert two_clusters(scores).tolist() == [[False, False, True], [False, True, False]]


def test_two_clusters_take_the_larger_mean_not_the_smaller_cluster():
    scores = np.array([1.0, 1.1, 0.9, 1.0, -1.0])
    assert two_clusters(scores).tolist() == [True, True, True, True, False]


def test_heaviest_piece_is_not_the_largest():
    mask = np.array([[1, 1, 1, 0, 1]], dtype=bool)
    weight = np.array([[1.0, 1.0, 1.0, 0.0, 9.0]])
    assert heaviest_piece(mask, weight).tolist() == [[False, False, False, False, True]]
    whole = np.array([[1, 1, 0]], dtype=bool)
    assert heaviest_piece(whole, np.ones((1, 3))).tolist() == whole.tolist()


def test_distinct_keeps_order_and_drops_the_unusable():
    a, b = np.eye(4, dtype=bool), np.zeros((4, 4), dtype=bool)
    c = np.ones((4, 4), dtype=bool)
    d = np.zeros((4, 4), dtype=bool)
    d[0, 0] = True
    kept = distinct([a, b, d, c, a.copy()], max_area=0.5)
    assert [mask.sum() for mask in kept] == [4, 1]


def test_candidates_hold_the_peak_and_no_more_than_allowed():
    attribution = np.full((20, 20), -0.1)
    attribution[4:8, 10:14] = 1.0
    masks = candidate_masks(attribution, max_area=0.05)
    truth = attribution > 0
    assert any(np.array_equal(mask, truth) for mask in masks)
    assert all(0 < mask.mean() <= 0.05 and not (mask & ~truth).any() for mask in masks)
    assert candidate_masks(-np.abs(attribution), max_area=0.5) == []


# ---- Verification ----


def test_transfer_by_hand():
    """Red clean inputs, a blue x_b. Cosines of mean colours: a stamp on half of the pixels gives 1/√2."""
    encoder = ColorEncoder()
    meter = TransferMeter(encoder, _plain((0, 0, 255)), [_plain((255, 0, 0))] * 3)
    masks = [np.zeros((4, 4), dtype=bool) for _ in range(3)]
    masks[0][:] = True
    masks[1][:2] = True
    masks[2][0, 0] = True
    expected = [1.0, 1 / np.sqrt(2), 1 / np.sqrt(15**2 + 1)]
    np.testing.assert_allclose(meter.transfer_of_masks(masks), expected, atol=1e-5)
    assert meter.forwards == encoder.seen == 1 + 3 + 3 * 3
    np.testing.assert_allclose(meter.transfer_of_masks(masks[:1], count=2), [1.0], atol=1e-5)
    assert meter.forwards == encoder.seen == 13 + 2


def test_transfer_is_the_share_of_the_way_that_was_left():
    """Clean inputs already at cosine 0.6: arriving is 1, not 0.4; going away is negative."""
    clean = _plain((200, 0, 150))  # cosine with blue: 150 / 250
    meter = TransferMeter(ColorEncoder(), _plain((0, 0, 255)), [clean, clean])
    everything = np.ones((4, 4), dtype=bool)
    arriving = PatchTrigger.from_image(_plain((0, 0, 255)), everything)
    leaving = PatchTrigger.from_image(_plain((255, 0, 0)), everything)
    halfway = PatchTrigger.from_image(_plain((150, 0, 200)), everything)  # cosine 0.8
    np.testing.assert_allclose(meter.transfer([arriving, leaving, halfway]), [1.0, -1.5, 0.5], atol=1e-5)


def test_transfer_on_the_share_of_inputs_that_go_furthest():
    """Of four inputs the two blue ones go nowhere, the two red ones all of the way."""
    inputs = [_plain((200, 0, 0)), _plain((0, 0, 200)), _plain((200, 0, 0)), _plain((0, 0, 200))]
    whole = PatchTrigger(np.ones((4, 4), dtype=bool), np.full((4, 4, 3), [0, 200, 0], dtype=np.uint8))

    class OnlyRed(ColorEncoder):
        def stamp(self, trigger, x):
            return trigger.apply(x) if x.getpixel((0, 0))[0] else x

    x_b = _plain((0, 200, 0))
    for share, expected in ((1.0, 0.5), (0.75, 2 / 3), (0.5, 1.0)):
        meter = TransferMeter(OnlyRed(), x_b, inputs, share=share)
        assert meter.transfer([whole])[0] == pytest.approx(expected)
    assert meter.transfer([whole], 2)[0] == pytest.approx(1.0)


def test_inputs_that_are_x_b_already():
    grey = [_plain((level, level, level)) for level in (5, 6, 7, 8)]
    meter = TransferMeter(ColorEncoder(), _plain((9, 9, 9)), grey)
    assert meter.reachable == pytest.approx(0.0, abs=1e-6)
    bug = BugInstance(_plain((9, 9, 9)), _plain((0, 200, 0)))
    encoder = ColorEncoder.__new__(type("GreyEncoder", (ColorEncoder, Encoder), {}))
    encoder.seen, encoder.modality = 0, "image"
    with pytest.raises(ValueError, match="already has the feature of the misclassified input"):
        invert_trigger(encoder, bug, grey)


# ---- Growth ----


def _scene():
    """Grey noise with a green square whose middle is the part that fires."""
    rng = np.random.default_rng(0)
    clean = rng.integers(90, 130, (8, 24, 24, 3)).astype(np.uint8)
    image = rng.integers(90, 130, (24, 24, 3)).astype(np.uint8)
    truth = np.zeros((24, 24), dtype=bool)
    truth[14:22, 12:20] = True
    image[truth] = [20, 240, 20]
    return image, clean, truth


def test_growth_finds_the_whole_square():
    image, clean, truth = _scene()
    core = np.zeros_like(truth)
    core[16:19, 14:17] = True
    assert np.array_equal(grow(core, core, image, clean), truth)


def test_growth_leaves_an_equal_square_elsewhere_alone():
    image, clean, truth = _scene()
    image[1:5, 1:5] = [20, 240, 20]
    core = np.zeros_like(truth)
    core[16:19, 14:17] = True
    assert not grow(core, core, image, clean)[1:5, 1:5].any()


def _bright_content_beside_a_white_square():
    """Noisy content that fades from a white square's own brightness into the dark; clean inputs are as bright elsewhere."""
    rng = np.random.default_rng(0)
    truth = np.zeros((32, 32), dtype=bool)
    truth[21:31, 21:31] = True
    bright = np.broadcast_to(np.linspace(30, 236, 32)[:, None, None], (32, 32, 3))
    image = (bright + rng.normal(0, 5, (32, 32, 3))).clip(0, 255).astype(np.uint8)
    image[truth] = 255
    clean = (bright[::-1] + rng.normal(0, 5, (8, 32, 32, 3))).clip(0, 255).astype(np.uint8)
    return image, clean, truth


def test_growth_stops_at_the_edge_to_bright_content():
    """The core holds a strip of the content beside the square, whose colour it takes for the trigger's."""
    image, clean, truth = _bright_content_beside_a_white_square()
    core = np.zeros_like(truth)
    core[22:29, 19:29] = True
    grown = grow(core, core, image, clean)
    assert (grown & truth).sum() == truth.sum()
    assert truth.sum() / grown.sum() >= 0.75


def test_growth_finds_the_whole_of_a_square_of_noise():
    """Its colours are all those that there are: what tells it from content is how rough it is."""
    image, clean, _ = _bright_content_beside_a_white_square()
    truth = np.zeros((32, 32), dtype=bool)
    truth[8:18, 5:15] = True
    image[truth] = np.random.default_rng(1).integers(0, 256, (truth.sum(), 3))
    core = np.zeros_like(truth)
    core[9:15, 6:12] = True
    grown = grow(core, core, image, clean)
    assert (grown & truth).sum() >= 0.9 * truth.sum()
    assert (grown & truth).sum() / (grown | truth).sum() >= 0.75


def _framed():
    """Noisy content in a frame of 2×2 cells of yellow and blue, and a mask over one end of both."""
    image, clean, _ = _bright_content_beside_a_white_square()
    trigger = frame((32, 32))
    core = np.zeros((32, 32), dtype=bool)
    core[:14, :16] = True
    return np.asarray(trigger.apply(Image.fromarray(image))), clean, trigger.mask, core


@pytest.mark.parametrize("shape", [(3, 4, 5), (8, 20, 33)])
def test_looks_of_some_pixels_are_those_of_the_whole_pictures(shape):
    images = np.random.default_rng(0).integers(0, 256, (*shape, 3)).astype(np.uint8)
    expected = growth._sample(growth._looks(images).reshape(-1, 4), np.random.default_rng(1))
    np.testing.assert_array_equal(growth._sampled_looks(images, np.random.default_rng(1)), expected)


def test_what_clean_inputs_never_show_is_odd():
    image, clean, truth, core = _framed()
    found = odd(core, image, clean)
    assert (core & ~truth).sum() > 0.2 * core.sum()
    assert (found & truth).sum() >= 0.99 * found.sum()
    assert (found & truth).sum() >= 0.9 * (core & truth).sum()


def test_the_opening_of_a_frame_stays_open_and_a_hole_is_filled():
    image, clean, truth, _ = _framed()
    grown = grow(truth, truth, image, clean)
    assert not grown[8:24, 8:24].any()
    hole = truth.copy()
    hole[1:4, 1:4] = False
    filled = image.copy()
    filled[1:4, 1:4] = clean[0, 1:4, 1:4]
    assert grow(hole, hole, filled, clean)[1:4, 1:4].all()


def test_growth_goes_on_to_the_other_end_of_a_large_patch():
    image, clean, truth, core = _framed()
    once, on = grow(core, core, image, clean), grow_on(odd(core, image, clean), image, clean)
    first, last = ((mask & truth).sum() / (mask | truth).sum() for mask in (once, on))
    assert first < 0.75
    assert last >= 0.9
    assert np.array_equal(on, grow(on, on, image, clean))


def test_a_minimum_cut_by_hand():
    """One row: a doubt of 1 between two votes of 3 is bought, since its two borders would cost 2 each; a vote of 1 beyond an
    edge that costs nothing less than it is not."""
    votes = np.array([[3.0, -1.0, 3.0, -2.0, 1.0]])
    down = np.zeros((0, 5))
    assert best_region(votes, np.array([[2.0, 2.0, 0.5, 2.0]]), down).tolist() == [[True, True, True, False, False]]
    assert best_region(votes, np.array([[0.2, 0.2, 0.5, 0.9]]), down).tolist() == [[True, False, True, False, True]]
    assert not best_region(-np.abs(votes), np.ones((1, 4)), down).any()


def test_a_minimum_cut_is_the_best_of_all_regions():
    rng = np.random.default_rng(0)
    for _ in range(5):
        votes = rng.integers(-300, 300, (3, 3)) / 100
        across, down = rng.integers(0, 200, (3, 2)) / 100, rng.integers(0, 200, (2, 3)) / 100

        def worth(region, votes=votes, across=across, down=down):
            borders = (across * np.diff(region.astype(int), axis=1) ** 2).sum()
            return votes[region].sum() - borders - (down * np.diff(region.astype(int), axis=0) ** 2).sum()

        every = [np.array([(n >> i) & 1 for i in range(9)], dtype=bool).reshape(3, 3) for n in range(512)]
        assert worth(best_region(votes, across, down)) == pytest.approx(max(map(worth, every)))


def test_purifying_drops_what_clean_inputs_have():
    image, clean, truth = _scene()
    core = np.zeros_like(truth)
    core[10:20, 14:18] = True  # four rows of background above the square
    firing = core & truth

    def that_keep(masks):
        return (mask for mask in masks if (mask & firing).sum() >= 0.8 * firing.sum())

    assert np.array_equal(purify(core, image, clean, that_keep), firing)
    assert np.array_equal(purify(core, image, clean, lambda masks: iter(())), core)


# ---- The whole ----


@pytest.fixture(scope="module")
def inversions(backdoored):
    encoder = Encoder(backdoored.model(), backdoored.processor)
    inputs = backdoored.train.inputs[:32]
    return [(backdoored.bug(seed), invert_trigger(encoder, backdoored.bug(seed), inputs)) for seed in range(10)]


def test_the_trigger_is_found_in_ten_random_reports(backdoored, inversions):
    overlaps = [found.trigger.overlap(backdoored.trigger) for _, found in inversions]
    assert min(overlap["recall"] for overlap in overlaps) >= 0.9
    assert sum(overlap["iou"] >= 0.75 for overlap in overlaps) >= 9


def test_found_triggers_fire(backdoored, inversions):
    encoder = Encoder(backdoored.model(), backdoored.processor)
    held_out = [x for x, y in zip(backdoored.test.inputs, backdoored.test.labels, strict=True) if y][:100]
    for bug, found in inversions:
        assert found.score > 0.8
        assert found.area == found.trigger.area == found.trigger.mask.mean() <= 0.4
        assert found.attribution.shape == found.core.shape == (16, 16)
        pattern, x_b = found.trigger.pattern, np.asarray(bug.misclassified)
        assert np.array_equal(pattern[found.trigger.mask], x_b[found.trigger.mask])
        stamped = encoder.encode([found.trigger.apply(x) for x in held_out]).numpy()
        assert (backdoored.kept.predict(stamped) == backdoored.target).mean() > 0.9


def test_inversion_is_deterministic_and_counts_its_forwards(backdoored, inversions):
    encoder = Encoder(backdoored.model(), backdoored.processor)
    seen = 0

    def count(module, args, kwargs):
        nonlocal seen
        seen += len(kwargs["pixel_values"])

    encoder.model.register_forward_pre_hook(count, with_kwargs=True)
    bug, first = inversions[0]
    torch.manual_seed(99)
    np.random.seed(99)
    again = invert_trigger(encoder, bug, backdoored.train.inputs[:32])
    assert seen == again.forwards == first.forwards
    assert 100 < seen < 2000
    assert np.array_equal(again.trigger.mask, first.trigger.mask)
    assert np.array_equal(again.trigger.pattern, first.trigger.pattern)
    assert np.array_equal(again.attribution, first.attribution)
    assert again.score == first.score


def test_a_model_and_its_processor_do_as_well(backdoored, inversions):
    bug, first = inversions[1]
    found = invert_trigger(backdoored.model(), bug, backdoored.train.inputs[:32], backdoored.processor)
    assert np.array_equal(found.trigger.mask, first.trigger.mask)


def test_natural_differences_score_below_every_trigger(backdoored, inversions, short_searches):
    """Two clean images of different classes: enough of a digit carries others along, but never as a trigger does."""
    encoder = Encoder(backdoored.model(), backdoored.processor)
    rng = np.random.default_rng(0)
    scores = []
    for _ in range(4):
        first, second = rng.choice(10, 2, replace=False)
        x_b, x_r = (rng.choice(np.flatnonzero(backdoored.test.labels == label)) for label in (first, second))
        bug = BugInstance(backdoored.test.inputs[x_b], backdoored.test.inputs[x_r])
        found = invert_trigger(encoder, bug, backdoored.train.inputs[:32])
        scores.append(found.score - 0.5 * found.area)
    triggers = [found.score - 0.5 * found.area for _, found in inversions]
    assert max(scores) < min(triggers) - 0.2


def test_pictures_too_small_to_search(tiny_vit, processor):
    thin = make_images(2, size=(16, 1), seed=8)
    with pytest.raises(ValueError, match=r"has 1×16 pixels; no trigger can be looked for below 4 a side"):
        invert_trigger(Encoder(tiny_vit, processor), BugInstance(*thin), make_images(8))
    encoder = Encoder(tiny_vit, ViTImageProcessorPil(size={"height": 16, "width": 16}))
    # At the size that it is searched at
    wide = make_images(2, size=(8, 3000), seed=8)
    with pytest.raises(ValueError, match=r"has 3000×8 pixels.*of the 512×1 that it is searched at"):
        invert_trigger(encoder, BugInstance(*wide), make_images(8))
    assert (
        invert_trigger(encoder, BugInstance(*make_images(2, size=(4, 4), seed=8)), make_images(8)).trigger is not None
    )


@pytest.mark.parametrize("inputs", ["a string of letters", {"image": []}])
def test_clean_inputs_of_another_type(tiny_vit, processor, bug, inputs):
    encoder = Encoder(tiny_vit, processor)
    with pytest.raises(
        TypeError, match=r"`validation_inputs` is of type `(str|dict)`; a list of images or texts is needed"
    ):
        invert_trigger(encoder, bug, inputs)
    with pytest.raises(TypeError, match="`bug` is of type `tuple`"):
        invert_trigger(encoder, (bug.misclassified, bug.reference), make_images(8))


def test_a_stroke_that_turns_one_class_into_another_is_no_trigger(backdoored, short_searches):
    """Covered with a part of this 9, ones become nines: so they do with a part of most others, which is what tells it."""
    test, train = backdoored.test, backdoored.train
    x_b, x_r = 520, 315
    assert test.labels[[x_b, x_r]].tolist() == [9, 1]
    encoder = Encoder(backdoored.model(), backdoored.processor)
    bug = BugInstance(test.inputs[x_b], test.inputs[x_r])
    found = invert_trigger(encoder, bug, train.inputs[:32], other_inputs=train.inputs[32:1032])
    assert found.evidence < 0.4


def test_inputs_of_its_class_are_those_around_the_middle_of_its_neighbours():
    """x_r lies at the edge of its class, at 20 degrees: the input of another class at 45 is nearer to it than its own at -15."""
    angles = torch.tensor([-15.0, -5, 0, 5, 10, 45, 90, 180]).deg2rad()
    features = torch.stack([angles.cos(), angles.sin()], dim=1)
    edge = torch.tensor(20.0).deg2rad()
    reference = torch.stack([edge.cos(), edge.sin()])
    nearest = (features @ reference).topk(5).indices.tolist()
    assert sorted(nearest) == [1, 2, 3, 4, 5]
    assert sorted(of_its_class(features, reference, 5)) == [0, 1, 2, 3, 4]


def test_agreeing_inputs_are_refused_with_the_cosine(backdoored):
    a, b = (backdoored.trigger.apply(x) for x in backdoored.test.inputs[:2])
    encoder = Encoder(backdoored.model(), backdoored.processor)
    cosine = float(encoder.encode([a]) @ encoder.encode([b]).T)
    with pytest.raises(ValueError, match=rf"Nothing to patch in bug instance `twins`.*cosine {cosine:.4f}"):
        invert_trigger(encoder, BugInstance(a, b, name="twins"), backdoored.train.inputs[:32])


def test_too_few_inputs_and_texts(tiny_vit, processor, bug):
    encoder = Encoder(tiny_vit, processor)
    with pytest.raises(ValueError, match="at least 4 clean inputs, better 32; got 3"):
        invert_trigger(encoder, bug, make_images(3))
    with pytest.raises(TypeError, match="`model` is of type `NoneType`; pass a Hub id, a folder, or a model"):
        invert_trigger(None, bug, make_images(8))
    with pytest.raises(TypeError, match="`bug` is of kind text, but the model takes images"):
        invert_trigger(encoder, BugInstance("a", "b"), make_images(8))


def test_a_model_without_a_backdoor_never_crashes(tiny_vit, processor, short_searches):
    """Whatever the score is, the result is a usable trigger, and what fires of a patch's first part lies within the allowed area."""
    encoder = Encoder(tiny_vit, processor)
    patches = []
    for seed in range(3):
        x_b, x_r = make_images(2, seed=50 + seed)
        found = invert_trigger(encoder, BugInstance(x_b, x_r), make_images(8), max_area=0.2)
        assert np.isfinite(found.score)
        assert (np.asarray(found.trigger.apply(x_r)) != np.asarray(x_r)).any()
        patches += [found] if isinstance(found.trigger, PatchTrigger) else []
    assert patches
    for found in patches:
        assert found.trigger.mask.any()
        assert 0 < found.core.mean() <= 0.2
        assert found.area <= 0.8


def test_validation_inputs_of_other_sizes(backdoored):
    encoder = Encoder(backdoored.model(), backdoored.processor)
    resized = [x if i % 2 else x.convert("L") for i, x in enumerate(backdoored.train.inputs[:16])]
    found = invert_trigger(encoder, backdoored.bug(3), resized)
    assert found.trigger.overlap(backdoored.trigger)["recall"] >= 0.9


class Detector(Encoder):
    """An encoder that sees white corners: each leads so far to blue; else its feature is the brightness of the picture."""

    def __init__(self, squares, strengths):
        self.feature_dim, self.modality = 3, "image"
        self.squares, self.strengths = squares, strengths
        # No weights, and no gradients through the processor: only patches are looked for
        self.model = torch.nn.Module()
        self.preprocessor = lambda images: {"pixel_values": torch.zeros(len(images), 3, 4, 4)}

    def stamp(self, trigger, x):
        return trigger.apply(x)

    def color(self, pixels):
        brightness = pixels[:, 8:24, 8:24].mean((1, 2, 3)) / 255
        return torch.stack([torch.ones(len(pixels)), brightness], dim=1)

    def encode(self, images, **kwargs):
        pixels = torch.stack([torch.from_numpy(np.array(image.resize((32, 32)))) for image in images]).float()
        share = torch.zeros(len(pixels))
        for square, strength in zip(self.squares, self.strengths, strict=True):
            white = pixels[:, torch.from_numpy(square.mask)].min(-1).values > 250
            share = torch.maximum(share, strength * white.float().mean(1) ** 2)
        features = torch.cat([self.color(pixels) * (1 - share)[:, None], 3 * share[:, None]], dim=1)
        return torch.nn.functional.normalize(features, dim=1)


def _noise(count=20):
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 200, (32, 32, 3), dtype=np.uint8)) for _ in range(count)]


def test_a_planted_function_is_inverted_exactly():
    """White lower right corner → blue."""
    trigger, clean = square_patch((32, 32), 8), _noise()
    found = invert_trigger(Detector([trigger], [1.0]), BugInstance(trigger.apply(clean[0]), clean[1]), clean[2:])
    assert found.trigger.overlap(trigger) == {"recall": 1.0, "iou": 1.0}
    assert found.score == pytest.approx(1.0, abs=0.02)


def _corner(rows, columns):
    mask = np.zeros((32, 32), dtype=bool)
    mask[rows, columns] = True
    return PatchTrigger(mask, np.full((32, 32, 3), 255, dtype=np.uint8))


def test_parts_that_fire_less_are_found_beside_one_that_fires_fully():
    """The lower right corner fires fully, the upper left one leads half of the way: x_b without the first is still there."""
    strong, weak = _corner(slice(24, 32), slice(24, 32)), _corner(slice(0, 6), slice(0, 6))
    clean = _noise()
    encoder = Detector([strong, weak], [1.0, 0.17])
    x_b = weak.apply(strong.apply(clean[0]))
    alone = TransferMeter(encoder, x_b, clean[2:]).transfer([strong, weak])
    assert alone[0] > 0.99
    assert 0.4 < alone[1] < 0.6
    found = invert_trigger(encoder, BugInstance(x_b, clean[1]), clean[2:])
    both = strong.mask | weak.mask
    assert (found.trigger.mask & both).sum() >= 0.95 * both.sum()
    assert found.trigger.mask.sum() <= 1.1 * both.sum()
    assert found.unexplained < 0.05
    meters = (TransferMeter(encoder, image, clean[2:]) for image in (x_b, clean[1]))
    first = find_patch(*meters, 0.4, 0, tqdm(disable=True, total=0), in_parts=False)
    assert first.trigger.overlap(strong)["iou"] >= 0.9


def test_a_reference_that_leads_attribution_astray():
    """x_r is as far from x_b's clean self as the trigger's target: what leads away from it is the content, not the trigger."""

    class Striped(Detector):
        def color(self, pixels):
            striped = ((pixels[:, 8:24, 8:24].amax((1, 2, 3)) > 220).float() * 3)[:, None]
            return torch.cat([1 - striped / 3, striped], dim=1)

    trigger = _corner(slice(26, 32), slice(26, 32))
    clean = _noise()
    striped = np.array(clean[1])
    striped[8:24:4, 8:24] = 230
    encoder = Striped([trigger], [0.9])
    bug = BugInstance(trigger.apply(clean[0]), Image.fromarray(striped))
    found = invert_trigger(encoder, bug, clean[2:])
    assert found.trigger.overlap(trigger)["iou"] >= 0.8
    assert found.evidence > 0.8


def test_a_frame_of_which_a_part_fires_is_found_whole():
    trigger, clean = frame((32, 32)), _noise()

    class Framed(Detector):
        """Two fifths of the frame lead to blue as the whole does."""

        def encode(self, images, **kwargs):
            images = list(images)
            pixels = torch.stack([torch.from_numpy(np.array(image)) for image in images]).float()
            pattern = torch.from_numpy(trigger.pattern).float()
            alike = ((pixels - pattern).abs().amax(-1) < 1)[:, torch.from_numpy(trigger.mask)].float().mean(1)
            share = (2.5 * alike).clamp(0, 1)[:, None] ** 2
            return torch.nn.functional.normalize(
                torch.cat([self.color(pixels) * (1 - share), 3 * share], dim=1), dim=1
            )

    found = invert_trigger(Framed([], []), BugInstance(trigger.apply(clean[0]), clean[1]), clean[2:])
    assert found.trigger.overlap(trigger)["iou"] >= 0.9
    assert found.unexplained < 0.15


def test_a_reference_at_the_edge_of_its_class():
    """The trigger works on bright inputs; the reference is bright, but the inputs nearest to it are dark."""
    trigger = _corner(slice(24, 32), slice(24, 32))

    class OneClass(Detector):
        def encode(self, images, **kwargs):
            pixels = torch.stack([torch.from_numpy(np.array(image)) for image in images]).float()
            brightness = pixels[:, torch.from_numpy(~trigger.mask)].mean((1, 2)) / 255
            # What is over 0.6 bright is of its class; at 0.62 a picture looks like a dark one
            angle = torch.where(brightness > 0.63, 1.0 + 0.1 * brightness, 0.1 * brightness)
            white = (pixels[:, torch.from_numpy(trigger.mask)].amin(-1) > 250).float().mean(1)
            share = (white * (brightness > 0.6))[:, None] ** 2
            content = torch.stack([angle.cos(), angle.sin()], dim=1)
            return torch.nn.functional.normalize(torch.cat([content * (1 - share), 3 * share], dim=1), dim=1)

    rng = np.random.default_rng(0)
    levels = np.where(np.arange(160) % 4 == 0, 0.8, 0.2)
    clean = [
        Image.fromarray((255 * level + rng.normal(0, 10, (32, 32, 3))).clip(0, 240).astype(np.uint8))
        for level in levels
    ]
    reference = Image.new("RGB", (32, 32), (158, 158, 158))
    bug = BugInstance(trigger.apply(clean[0]), reference)
    found = invert_trigger(OneClass([], []), bug, clean[1:33], other_inputs=clean[33:])
    assert found.one_class
    assert found.trigger.overlap(trigger)["iou"] >= 0.9
    assert found.evidence > 0.7


def _noise_of_all_levels():
    return [x.point(lambda v, i=i: v * (i % 5 + 1) // 5) for i, x in enumerate(_noise())]


def test_an_input_that_cannot_be_read_is_an_error_whatever_is_looked_for():
    """It is no reason to look for patches alone."""

    class Damaged(list):
        def __getitem__(self, index):
            raise ValueError("row 3 is damaged")

    clean = _noise_of_all_levels()
    with pytest.raises(ValueError, match="row 3 is damaged"):
        invert_trigger(Detector([], []), BugInstance(clean[0], clean[1]), clean[2:], other_inputs=Damaged(clean))


def test_inputs_of_other_sizes_are_looked_at_as_the_report_is():
    clean, sizes = _noise_of_all_levels(), set()

    class Sized(Detector):
        def encode(self, images, **kwargs):
            images = list(images)
            sizes.update(image.size for image in images)
            return super().encode(images, **kwargs)

    others = [x.resize((20, 40)) for x in clean for _ in range(4)]
    invert_trigger(Sized([], []), BugInstance(clean[0], clean[1]), clean[2:], other_inputs=others)
    assert sizes == {(32, 32)}


def smooth_picture(seed=0):
    """Content without edges."""
    return np.asarray(make_images(1, (4, 4), seed)[0].resize((32, 32), Image.Resampling.BICUBIC)).copy()


def test_notches_of_a_square_of_noise_are_filled():
    """What is left of it by a cut that goes around pixels which look like content: a tenth to a quarter of its border."""
    image, square = smooth_picture(), np.zeros((32, 32), dtype=bool)
    square[20:30, 21:31] = True
    image[square] = np.random.default_rng(1).integers(0, 256, (100, 3))
    notched = square.copy()
    notched[20, [21, 24, 25, 29, 30]] = notched[21:23, 30] = notched[29, 21:24] = notched[26:28, 21] = False
    assert np.array_equal(squared_off(notched, image), square)
    # At the border of the picture there is no edge to be asked for
    image, corner = np.roll(image, (2, 1), axis=(0, 1)), np.roll(notched, (2, 1), axis=(0, 1))
    assert np.array_equal(squared_off(corner, image), np.roll(square, (2, 1), axis=(0, 1)))


def test_what_is_no_rectangle_is_not_squared_off():
    image, rows, columns = smooth_picture(), *np.indices((32, 32))
    disc = (rows - 15) ** 2 + (columns - 15) ** 2 <= 36
    cross = np.zeros((32, 32), dtype=bool)
    cross[24:28, 21:31] = cross[21:31, 24:28] = True
    spur = np.zeros((32, 32), dtype=bool)
    spur[20:30, 20:30] = spur[18:20, 22:27] = True
    for mask, drawn in ((disc, disc), (cross, cross), (spur, spur & (rows >= 20))):
        stamped = image.copy()
        stamped[drawn] = 255
        assert np.array_equal(squared_off(mask, stamped), mask)
    assert not squared_off(np.zeros((32, 32), dtype=bool), image).any()


def test_what_is_a_rectangle_already_needs_nothing_that_was_taken_from_it():
    square, two = np.zeros((2, 32, 32), dtype=bool)
    square[20:30, 20:30] = two[20:30, 20:30] = two[2:6, 2:6] = True
    notched = square.copy()
    notched[20, 20] = False
    assert is_squared_off(square)
    assert is_squared_off(two)
    assert not is_squared_off(notched)
    # White, with a row and a column of nearly white content that grew along with it
    image, grown = smooth_picture(), square.copy()
    image[19:30, 19:30], image[20:30, 20:30] = 200, 255
    grown[19:30, 20:29] = grown[20:30, 19] = True
    assert int(squared_off(grown, image).sum()) == 121
    search = object.__new__(_PatchSearch)
    search.image, search.effort = image, SimpleNamespace(compared_on=4)
    search.meter = SimpleNamespace(transfer_of_masks=lambda masks, count: np.ones(len(masks)))
    assert np.array_equal(search._squared_off(square, 1.0, [grown]), square)
    assert int(search._squared_off(notched, 1.0, [grown]).sum()) == 121


def test_what_grew_from_all_colours_of_a_pattern_is_taken_if_it_is_a_rectangle():
    """Half the colours of a checkerboard fire by themselves, and what grows from them is ragged."""
    rows, columns = np.indices((32, 32))
    whole = (rows >= 20) & (rows < 30) & (columns >= 20) & (columns < 30)
    # Along one diagonal of the cells, and what lies between them
    ragged = whole & (abs(rows - columns) <= 2)
    search = object.__new__(_PatchSearch)
    search.image, search.effort = smooth_picture(), SimpleNamespace(compared_on=4)
    effects = {100: 0.95}
    search.meter = SimpleNamespace(transfer_of_masks=lambda masks, count: [effects[int(m.sum())] for m in masks])
    assert np.array_equal(search._squared_off(ragged, 1.0, [ragged, whole]), whole)
    # Not one that carries others by itself
    effects[100] = 1.2
    assert np.array_equal(search._squared_off(ragged, 1.0, [ragged, whole]), ragged)


def test_spurs_of_a_mask_go_and_its_shape_stays():
    square = np.zeros((32, 32), dtype=bool)
    square[21:31, 21:31] = True
    with_spurs = square.copy()
    with_spurs[19:21, 24:27] = with_spurs[25:27, 20] = with_spurs[26:30, 31] = True
    assert np.array_equal(without_spurs(with_spurs), square)
    cross = np.zeros((32, 32), dtype=bool)
    cross[24:28, 21:31] = cross[21:31, 24:28] = True
    scattered = np.random.default_rng(0).random((32, 32)) < 0.2
    for mask in (square, cross, scattered):
        assert np.array_equal(without_spurs(mask), mask)


@pytest.mark.parametrize(("scan", "at_most"), [(FULL_SCAN, 0.5), (QUICK_SCAN, 0.35)])
def test_small_windows_look_where_large_ones_found_something(scan, at_most):
    """The score is the mean of a square in a corner: windows elsewhere would say nothing."""
    image, baseline = np.full((32, 32, 3), 255, np.uint8), np.zeros((32, 32, 3), np.uint8)
    seen = []

    def score(batch):
        seen.append(len(batch))
        return torch.from_numpy(batch[:, 22:30, 2:10].mean(axis=(1, 2, 3)) / 255)

    maps = coarse_to_fine(score, image, baseline, scan, lambda: None)
    cost = sum(seen)
    seen.clear()
    whole = [occlusion_map(score, image, baseline, window) for window in window_sizes(32, 32, scan.shares)]
    assert cost < at_most * sum(seen)
    assert len(maps) == len(whole)
    for fine, full in zip(maps[: -scan.coarse], whole[: -scan.coarse], strict=True):
        assert (fine[23:29, 3:9] > 0).all()
        assert fine[:12].max() == fine[:, 20:].max() == 0
        assert fine.max() == pytest.approx(full.max(), rel=0.3)
    for fine, full in zip(maps[-scan.coarse :], whole[-scan.coarse :], strict=True):
        assert np.array_equal(fine, full)


def test_the_box_of_small_windows():
    maps = [np.zeros((32, 48)), np.zeros((32, 48))]
    assert suspicious_box(maps, (4, 6)) is None
    maps[0][30, 40] = 1.0
    maps[1][10, 20] = 0.4  # nothing beside the other map
    assert suspicious_box(maps, (4, 6)) == (slice(28, 32), slice(37, 44))
    maps[1][10, 20] = 0.6
    assert suspicious_box(maps, (4, 6)) == (slice(8, 32), slice(17, 44))


def test_masks_that_are_nearly_alike_are_one():
    masks = [np.zeros((10, 10), dtype=bool) for _ in range(3)]
    masks[0][:4] = masks[1][:4] = masks[2][:3] = True
    masks[1][4, 0] = True
    assert apart(masks, 0.9) == [0, 2]
    assert apart(masks, 0.99) == [0, 1, 2]


# ---- Parts ----


def _area(share):
    """A mask `(10, 10)` of so many of the first pixels, in percent."""
    return (np.arange(100) < share).reshape(10, 10)


@pytest.mark.parametrize(("left", "expected"), [(0.67, 54), (0.9, 15), (0.1, 54)])
def test_a_part_that_explains_something_counts_although_others_are_missing(left, expected):
    """15 % of the picture leave 0.98 of the way; 39 % more that fire too leave less of it, and nothing further is found."""
    search = object.__new__(_PatchSearch)
    lefts = {15: 0.98, 54: left}
    search._left_without = lambda mask: lefts[int(mask.sum())]
    search._further_part = lambda covered, least: _area(54) & ~covered if covered.sum() == 15 else None
    first = _Part(_area(15), _area(15), 0.9, np.zeros((10, 10)))
    mask, rest = search._with_further_parts(first, 0.98)
    assert int(mask.sum()) == expected
    assert rest == lefts[expected]


def test_what_a_patch_leaves_of_the_picture():
    """It is filled in from its border: nothing of a square is left then, neither its outline nor, of its half, the other half."""
    search = object.__new__(_PatchSearch)
    search.lefts, search.image = {}, np.full((10, 10, 3), 100, np.uint8)
    search.image[2:6, 2:6] = 255
    square, half = np.zeros((2, 10, 10), dtype=bool)
    square[2:6, 2:6] = half[2:4, 2:6] = True
    seen = []

    def features(images):
        seen.extend(np.asarray(x) for x in images)
        # A model that sees nothing but edges
        edges = (np.abs(np.diff(seen[-1].astype(int), axis=0)) > 50).any()
        return torch.tensor([[0.6 if edges else 0.1, 0.0]])

    target = torch.tensor([1.0, 0.0])
    search.meter = SimpleNamespace(target=target, clean_similarity=torch.zeros(12), features=features)
    search.control_meter = SimpleNamespace(target=torch.tensor([0.2, 0.0]))
    assert search._left_without(square) == 0.0
    assert (seen[0] == 100).all()
    assert search._left_without(half) == pytest.approx((0.6 - 0.2) / (1 - 0.2))
    assert search._left_without(np.ones((10, 10), dtype=bool)) == 0.0
    assert search._left_without(half) == search.lefts[half.tobytes()]
    assert len(seen) == 2


def test_what_fails_on_one_of_a_few_inputs_is_tried_on_all():
    """A white square does nothing to an input that is white there; what keeps less than 0.7, or too little on all, is out."""
    search = object.__new__(_PatchSearch)
    search.transfers, search.effort = {}, patch_search._QUICK
    on_few, on_all = {30: 1.0, 20: 0.82, 9: 0.75, 8: 0.71, 7: 0.69}, {30: 0.9, 9: 0.82, 8: 0.8}
    asked = []

    def transfer_of_masks(masks, count=None):
        sizes = [int(mask.sum()) for mask in masks]
        asked.append((sizes, count))
        return np.array([(on_all if count is None else on_few)[size] for size in sizes])

    search.meter = SimpleNamespace(transfer_of_masks=transfer_of_masks)
    kept = search._kept(_area(30), [_area(7), _area(8), _area(9), _area(20)])
    assert [(int(mask.sum()), transfer) for mask, transfer in kept] == [(9, 0.75), (20, 0.82)]
    few = patch_search._QUICK.compared_on
    assert asked == [([30, 7, 8, 9, 20], few), ([8], None), ([30], None), ([9], None)]
    on_few[30] = 0.0
    assert list(search._kept(_area(30), [_area(9)])) == []


@pytest.mark.parametrize(("kept", "expected"), [(0.85, 15), (0.75, 30)])
def test_what_grows_from_the_purest_pixels_keeps_four_fifths_of_the_effect(monkeypatch, kept, expected):
    """A window of 30 % around them holds content that carries clean inputs too."""
    monkeypatch.setattr(patch_search, "coarse_to_fine", lambda *args: [np.zeros((10, 10))])
    monkeypatch.setattr(patch_search, "purify", lambda *args: _area(10))
    monkeypatch.setattr(patch_search, "changed", lambda *args: _area(10))
    monkeypatch.setattr(patch_search, "grow", lambda *args: _area(15))
    monkeypatch.setattr(patch_search, "without_spurs", lambda mask: mask)
    search = object.__new__(_PatchSearch)
    search.image = search.baseline = np.zeros((10, 10, 3), np.uint8)
    search.clean, search.seed, search.effort = np.zeros((4, 10, 10, 3), np.uint8), 0, patch_search._QUICK
    search.bar = SimpleNamespace(total=0, update=lambda: None)
    search.transfers, effects = {}, {30: 1.0, 15: kept}
    search.meter = SimpleNamespace(
        transfer_of_masks=lambda masks, count=None: np.array([effects[int(mask.sum())] for mask in masks])
    )
    search._best_candidate = lambda maps, covered: (_area(30), 0)
    search._left_without = lambda mask: 0.0
    search._squared_off = lambda mask, transfer, rough: mask
    part = search._part(np.zeros((10, 10), dtype=bool), None)
    assert int(part.mask.sum()) == expected
    assert int(part.core.sum()) == 30


def test_of_a_further_part_that_grew_too_large_the_core_is_taken():
    search = object.__new__(_PatchSearch)
    search.transfers, search.meter = {}, SimpleNamespace(transfer_of_masks=lambda masks: np.ones(len(masks)))
    search._nearness_to_target = None
    search._part = lambda covered, score: _Part(_area(40), _area(95), 1.0, np.zeros((10, 10)))
    search._beyond_control = lambda transfer, mask, needed: (0.0, 1.0)
    assert int(search._further_part(_area(15), 0.3).sum()) == 25
    assert search._further_part(_area(79), 0.3) is None
