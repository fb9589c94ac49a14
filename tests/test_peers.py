# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""The rival defences: what they cost, what they change, and their formulas by hand."""

import copy

import numpy as np
import pytest
import torch
from transformers import CLIPConfig, CLIPModel, ResNetConfig, ResNetModel, ViTConfig, ViTModel

from hf_mudjacking import Encoder
from hf_mudjacking.inversion.attribution import occlusion_map
from hf_mudjacking.peers import (
    PEERS,
    repair_clean_fine_tuning,
    repair_ft_sam,
    repair_nad,
    repair_official,
    repair_ssl_cleanse,
)
from hf_mudjacking.peers.augmentation import official_view
from hf_mudjacking.peers.cluster_inversion import ClusterTrigger, Price, SearchSettings, cluster_triggers, outlying
from hf_mudjacking.peers.contrastive import nt_xent, two_text_views
from hf_mudjacking.peers.ft_sam import AdaptiveSAM, adaptive_perturbation
from hf_mudjacking.peers.nad import attention_map, depths
from hf_mudjacking.peers.official import official_trigger
from hf_mudjacking.peers.ssl_cleanse import share_of_rate, suspicious
from hf_mudjacking.peers.text_views import edited
from hf_mudjacking.triggers import noise_blend

from .conftest import TINY, largest_difference, make_images, pixels_by_hand, weights_of
from .text_models import make_text_model


# Two steps of each, as small as they come.
SMALL = {
    "official": {"batch_size": 8, "max_steps": 2},
    "clean_fine_tuning": {"batch_size": 8, "learning_rate": 1e-3, "max_steps": 2},
    "nad": {"batch_size": 8, "betas": (1000.0, 1000.0), "teacher_epochs": 1, "max_steps": 2},
    "ft_sam": {"batch_size": 8, "rho": 0.1, "max_steps": 2},
    "ssl_cleanse": {
        "batch_size": 8, "max_steps": 2, "clusters": 2, "rounds": 3, "patience": 1, "success": 0.2,
        "inversion_batch_size": 4,
    },
}  # fmt: skip
# In forward equivalents a clean input and step, as the docstrings say
COST = {"official": 17, "clean_fine_tuning": 6, "nad": 8, "ft_sam": 12, "ssl_cleanse": 6}
OF_TEXTS = ("clean_fine_tuning", "nad", "ft_sam")
SETTINGS = SearchSettings(
    rounds=8, steps_per_round=3, batch_size=32, learning_rate=0.1, success=0.9, first_price=0.1, price_factor=1.5, patience=2
)  # fmt: skip


def make_model(family):
    torch.manual_seed(0)
    if family == "ViT":
        return ViTModel(ViTConfig(**TINY, hidden_dropout_prob=0.1)).train()
    config = ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic")
    return ResNetModel(config).train()


@pytest.fixture
def count_forwards(monkeypatch):
    """Forward equivalents, counted where every input of a model passes."""
    counted = []
    original = Encoder._call

    def call(self, model, placed):
        counted.append(len(next(iter(placed.values()))) * (3 if torch.is_grad_enabled() else 1))
        return original(self, model, placed)

    monkeypatch.setattr(Encoder, "_call", call)
    return counted


def test_the_table_names_every_peer_once():
    assert [peer.name for peer in PEERS] == ["official", "clean_fine_tuning", "nad", "ft_sam", "ssl_cleanse"]
    assert all(peer.source and peer.recipe for peer in PEERS)


@pytest.mark.parametrize("family", ["ViT", "ResNet"])
@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.name)
def test_every_peer_changes_a_copy_and_counts_what_it_costs(peer, family, processor, images, bug, count_forwards):
    model = make_model(family)
    encoder = Encoder(model, processor)
    model.train()
    before, modes = weights_of(model), [module.training for module in model.modules()]
    count_forwards.clear()
    seen = []
    repaired = peer.repair(
        encoder, images, bug, disable_tqdm=True, after_step=lambda *seen_now: seen.append(seen_now), **SMALL[peer.name]
    )

    assert repaired.forward_equivalents == sum(count_forwards)
    assert [steps for _, steps, _ in seen] == [1, 2]
    assert repaired.steps == 2
    assert seen[1][2] - seen[0][2] == COST[peer.name] * 8
    assert seen[1][2] == repaired.forward_equivalents
    assert seen[0][0] is repaired.model

    # The model that was given: weights, statistics, modes and what of it is trainable
    assert repaired.model is not model
    assert largest_difference(weights_of(model), before) == 0
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert (repaired.trigger is not None) == (peer.name in ("official", "ssl_cleanse"))

    after = weights_of(repaired.model)
    assert largest_difference(after, before) > 0
    normalization = [name for name in after if "normalization" in name]
    assert bool(normalization) == (family == "ResNet")
    for name in normalization:
        assert torch.equal(after[name], before[name]), name


@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.name)
def test_the_same_seed_gives_the_same_weights(peer, processor, images, bug):
    encoder = Encoder(make_model("ResNet"), processor)

    def weights(seed):
        torch.rand(3)  # the global random state plays no part
        np.random.rand(3)
        return weights_of(peer.repair(encoder, images, bug, seed=seed, disable_tqdm=True, **SMALL[peer.name]).model)

    first = weights(1)
    assert largest_difference(first, weights(1)) == 0
    assert largest_difference(first, weights(2)) > 0


@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.name)
def test_too_few_inputs_for_a_batch(peer, tiny_vit, processor, images, bug):
    with pytest.raises(ValueError, match="There are 16 clean inputs, and only whole batches of 17 are used"):
        peer.repair(Encoder(tiny_vit, processor), images, bug, batch_size=17)


@pytest.mark.parametrize("peer", [p for p in PEERS if p.name in OF_TEXTS], ids=lambda peer: peer.name)
def test_texts_are_repaired_too(peer, count_forwards):
    model, tokenizer = make_text_model("bert")
    encoder, texts = Encoder(model, tokenizer), [f"a film {'so very ' * i}good" for i in range(16)]
    before = weights_of(model)
    count_forwards.clear()

    def repaired(seed):
        return peer.repair(encoder, texts, seed=seed, disable_tqdm=True, **SMALL[peer.name])

    first = repaired(1)
    assert first.forward_equivalents == sum(count_forwards)
    assert first.steps == 2
    assert largest_difference(weights_of(model), before) == 0
    after = weights_of(first.model)
    assert largest_difference(after, before) > 0
    assert largest_difference(after, weights_of(repaired(1).model)) == 0
    assert largest_difference(after, weights_of(repaired(2).model)) > 0


@pytest.mark.parametrize("peer", [p for p in PEERS if p.name not in OF_TEXTS], ids=lambda peer: peer.name)
def test_text_encoders_are_refused(peer, bug):
    model, tokenizer = make_text_model("bert")
    with pytest.raises(ValueError, match="takes texts, and this defence is for vision encoders"):
        peer.repair(Encoder(model, tokenizer), ["a", "b"] * 8, bug, batch_size=8, disable_tqdm=True)


def cosine(a, b):
    return ((a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))).mean()


def test_the_first_official_step_is_that_of_a_loss_made_by_hand(tiny_vit, processor, images, bug):
    encoder = Encoder(tiny_vit, processor)
    settings = {"learning_rate": 0.1, "weight_decay": 0.02, "batch_size": 8, "max_steps": 1, "seed": 3}
    repaired = repair_official(encoder, images, bug, disable_tqdm=True, **settings)

    generator = torch.Generator().manual_seed(3)
    rows = torch.randperm(16, generator=generator)[:8].tolist()
    x, e = [images[i] for i in rows], repaired.trigger
    x_b, x_r = [bug.misclassified] * 8, [bug.reference] * 8
    streams = [x, [e.apply(image) for image in x], x_b, x_r, [e.apply(image) for image in x_r]]
    # `pixels_by_hand` gives -1 to 1
    views = [2 * official_view((pixels_by_hand(stream) + 1) / 2, generator) - 1 for stream in streams]
    model = copy.deepcopy(tiny_vit).eval()
    with torch.no_grad():
        frozen = [model(view).last_hidden_state[:, 0] for view in views]
    patched = [model(view).last_hidden_state[:, 0] for view in views]
    loss = -cosine(patched[0], frozen[0]) - cosine(patched[3], frozen[3])
    loss = loss - cosine(patched[1], patched[0]) - cosine(patched[4], patched[3])
    loss = loss - cosine(patched[2], patched[3])
    loss.backward()
    moved = weights_of(repaired.model)
    for name, parameter in model.named_parameters():
        wanted = parameter.detach()
        if parameter.grad is not None:
            wanted = wanted - 0.1 * (parameter.grad + 0.02 * wanted)
            assert not torch.equal(moved[name], parameter.detach()), name
        assert torch.allclose(moved[name], wanted, atol=2e-5), name


def test_official_inversion_finds_a_known_patch(backdoored):
    encoder = Encoder(backdoored.model().eval(), backdoored.processor)
    recalls = []
    for seed in range(3):
        trigger, forwards = official_trigger(encoder, backdoored.bug(seed))
        recalls.append(trigger.overlap(backdoored.trigger)["recall"])
        assert trigger.area < 0.5
        # Window of 2 at a side of 16 (5 at 32): 15 · 15 places, x_b and x_r
        assert forwards == 15 * 15 + 2
    assert np.median(recalls) >= 0.8


def test_occlusion_pixel_by_pixel_is_a_mean_over_covering_windows():
    image = np.random.default_rng(0).integers(0, 256, (6, 7, 3), dtype=np.uint8)
    weights = torch.rand(6, 7, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def score(batch):
        return (torch.from_numpy(batch).double() * weights).sum(dim=(1, 2, 3)).square().sqrt()

    baseline = np.full_like(image, 90)
    found = occlusion_map(score, image, baseline, (2, 3), (1, 1))
    falls, covering = np.zeros((6, 7)), np.zeros((6, 7))
    for top in range(5):
        for left in range(5):
            occluded = image.copy()
            occluded[top : top + 2, left : left + 3] = 90
            falls[top : top + 2, left : left + 3] += float(score(image[None]) - score(occluded[None]))
            covering[top : top + 2, left : left + 3] += 1
    assert np.allclose(found, falls / covering, rtol=1e-3)


def test_official_inversion_of_a_constant_score(tiny_vit, processor, bug):
    with torch.no_grad():
        for parameter in tiny_vit.embeddings.patch_embeddings.parameters():
            parameter.zero_()
    with pytest.raises(ValueError, match="changes its feature nowhere"):
        official_trigger(Encoder(tiny_vit, processor), bug)


def test_contrastive_loss_by_hand():
    # Views of two pictures: the first two are orthogonal, their partners are equal to them
    features = torch.eye(2).repeat(2, 1)
    share = np.exp(2.0) / (np.exp(2.0) + 2)
    assert float(nt_xent(features, 0.5)) == pytest.approx(-np.log(share))
    # A partner that is another picture's feature
    assert float(nt_xent(torch.tensor([[1.0, 0], [0, 1], [0, 1], [1, 0]]), 0.5)) == pytest.approx(
        -np.log(1 / (np.exp(2.0) + 2))
    )


def test_attention_by_hand():
    maps = torch.tensor([[[[1.0, 2.0]], [[2.0, -2.0]]]])  # two channels, 1 x 2 places
    wanted = torch.tensor([[5.0, 8.0]]) / np.sqrt(25 + 64)
    assert torch.allclose(attention_map(maps), wanted)
    tokens = maps.flatten(2).transpose(1, 2)
    assert tokens.shape == (1, 2, 2)
    assert torch.allclose(attention_map(tokens), wanted)
    assert torch.allclose(attention_map(maps, power=1.0), torch.tensor([[0.6, 0.8]]))
    # Padding takes no part
    padded = torch.cat([tokens, torch.full((1, 1, 2), 9.0)], dim=1)
    found = attention_map(padded, mask=torch.tensor([[1, 1, 0]]))
    assert torch.allclose(found, torch.cat([wanted, torch.zeros(1, 1)], dim=1))


def test_views_of_texts():
    """Words change places, or a tenth of them goes; nothing else happens."""
    text = " ".join(f"word{i}" for i in range(20))
    generator = torch.Generator().manual_seed(0)
    views = [edited(text, generator).split() for _ in range(400)]
    swapped = [view for view in views if view != text.split() and sorted(view) == sorted(text.split())]
    # Two exchanges of two words each
    assert all(sum(a != b for a, b in zip(view, text.split(), strict=True)) <= 4 for view in swapped)
    assert 160 <= len(swapped) <= 240
    shorter = [view for view in views if len(view) < 20]
    assert all(view == [word for word in text.split() if word in set(view)] for view in shorter)
    # Of those that may lose words 0.9^20 = 0.12 lose none
    assert 1.9 <= np.mean([20 - len(view) for view in shorter]) <= 2.6
    assert edited("alone", generator) == "alone"
    assert all(edited("two words", generator) for _ in range(300))
    assert edited(text, torch.Generator().manual_seed(7)) == edited(text, torch.Generator().manual_seed(7))


def test_views_of_texts_in_a_batch():
    model, tokenizer = make_text_model("bert")
    encoder = Encoder(model, tokenizer)
    texts = ["a good film .", "a very good film indeed .", "no"]
    batch = two_text_views(encoder, texts, torch.Generator().manual_seed(2))(torch.tensor([2, 0]))
    generator = torch.Generator().manual_seed(2)
    wanted = encoder.preprocess([edited(texts[i], generator) for i in (2, 0, 2, 0)])
    assert all(torch.equal(batch[name], wanted[name]) for name in wanted)


def test_depths_are_spread_to_the_last():
    assert depths(13, 3) == [4, 8, 12]
    assert depths(5, 3) == [1, 3, 4]
    assert depths(3, 2) == [1, 2]
    with pytest.raises(ValueError, match="names 3 depths and the model gives hidden states of 2 layers"):
        depths(3, 3)


@pytest.mark.parametrize("family", ["ViT", "ResNet"])
def test_a_student_comes_to_look_where_its_teacher_looks(family, processor, images):
    encoder = Encoder(make_model(family).eval(), processor)
    taught = repair_clean_fine_tuning(encoder, images, learning_rate=1e-3, epochs=4, batch_size=8, disable_tqdm=True)
    inputs = encoder.preprocess(images)

    @torch.no_grad()
    def distance(model):
        own, wanted = (
            attention_map(encoder.with_model(m).features_and_hidden_states(inputs)[1][2])
            for m in (model, taught.model)
        )
        return float((own - wanted).square().mean())

    student = repair_nad(
        encoder, images, betas=(0.0, 1000.0), learning_rate=1e-4, teacher_learning_rate=1e-3, teacher_epochs=4,
        batch_size=8, max_steps=20, disable_tqdm=True,
    ).model  # fmt: skip
    assert distance(student) < 0.5 * distance(encoder.model)


def test_two_towers_give_the_hidden_states_of_the_one_that_is_meant(processor):
    towers = {
        "vision_config": TINY,
        "text_config": {
            **{k: TINY[k] for k in list(TINY)[:4]},
            "vocab_size": 20,
            "bos_token_id": 0,
            "eos_token_id": 1,
        },
    }
    model = CLIPModel(CLIPConfig(**towers, projection_dim=24)).eval()
    encoder = Encoder(model, processor, modality="image")
    inputs = encoder.preprocess(make_images(3))
    features, hidden = encoder.features_and_hidden_states(inputs)
    assert torch.equal(features, encoder.features(inputs))
    assert [tuple(states.shape) for states in hidden] == [(3, 17, 32)] * 3


def test_sam_perturbation_by_hand():
    first, second = torch.tensor([2.0, -1.0]), torch.tensor([[0.5]])
    first.grad, second.grad = torch.tensor([1.0, 3.0]), torch.tensor([[-4.0]])
    # |w| · g is (2, 3) and -2, of norm √17
    found = adaptive_perturbation([first, second], rho=0.5)
    assert torch.allclose(found[0], 0.5 * torch.tensor([4.0, 3.0]) / np.sqrt(17))
    assert torch.allclose(found[1], 0.5 * torch.tensor([[-1.0]]) / np.sqrt(17))
    relative = torch.cat([(found[0] / first).flatten(), (found[1] / second).flatten()])
    assert float(relative.norm()) == pytest.approx(0.5)


def test_more_betas_than_layers_are_refused_before_a_teacher_is_trained(tiny_vit, processor, images, count_forwards):
    encoder = Encoder(tiny_vit, processor)
    count_forwards.clear()
    with pytest.raises(ValueError, match="names 3 depths and the model gives hidden states of 2 layers"):
        repair_nad(encoder, images, batch_size=8, disable_tqdm=True)
    assert sum(count_forwards) == 1


def test_a_sam_step_by_hand():
    weight = torch.nn.Parameter(torch.tensor([2.0]))
    unused = torch.nn.Parameter(torch.tensor([7.0]))
    optimizer = AdaptiveSAM([weight, unused], rho=0.1, lr=0.5)
    seen = []

    def closure():
        optimizer.zero_grad()
        seen.append(weight.item())
        loss = (weight**2).sum()
        loss.backward()
        return loss.detach()

    # ε = 0.1 · 2² · 4 / (2 · 4) = 0.2; the gradient at 2.2 is 4.4
    assert float(optimizer.step(closure)) == pytest.approx(4.0)
    assert seen == pytest.approx([2.0, 2.2])
    assert weight.item() == pytest.approx(2.0 - 0.5 * 4.4)
    assert unused.item() == 7.0


def test_without_rho_sam_is_sgd(tiny_vit, processor, images):
    """ρ = 0 descends where it stands: the loss of the same views falls as that of plain SGD would."""
    encoder = Encoder(tiny_vit, processor)
    found = [
        weights_of(repair_ft_sam(encoder, images, rho=rho, batch_size=8, max_steps=1, disable_tqdm=True).model)
        for rho in (0.0, 1e-7, 1.0)
    ]
    assert largest_difference(found[0], found[1]) < 1e-4
    assert largest_difference(found[0], found[2]) > 1e-4


def test_the_price_of_a_mask_by_hand():
    price, values = Price(SETTINGS), []
    for reached in (False, False, True, True, True, True, False, True, False, False):
        price.update(reached)
        values.append(price.value)
    # Patience of two: nothing until it worked twice, then times 1.5, then divided by it
    assert values == pytest.approx([0, 0, 0, 0.1, 0.1, 0.15, 0.15, 0.15, 0.15, 0.1])


def test_outliers_by_hand():
    # Median 0.5; the median deviation is 0.05, times 1.4826 and 2: 0.148
    assert outlying([0.5, 0.55, 0.45, 0.1, 0.5, 0.6, 0.3]) == [3, 6]
    assert outlying([0.5, 0.55, 0.45, 0.4]) == []
    assert outlying([0.5, 0.5, 0.9]) == []


def test_what_is_unlearned():
    def trigger(size, cluster):
        return ClusterTrigger(noise_blend((4, 4)), size, cluster)

    clear = [trigger(0.5, 0), trigger(0.1, 1), trigger(0.55, 2), trigger(0.45, 3), trigger(0.5, 4)]
    assert [each.cluster for each in suspicious(clear, 5)] == [1]
    # None stands out: the smallest all the same; none at all: nothing
    assert [each.cluster for each in suspicious(clear[2:], 3)] == [3]
    assert suspicious([], 3) == []
    # A cluster without a trigger counts as one that needs the whole picture
    assert [each.cluster for each in suspicious([trigger(0.1, 2)], 4)] == [2]


def test_where_no_mask_works_nothing_is_changed(tiny_vit, processor, images):
    encoder = Encoder(tiny_vit, processor)
    before = weights_of(tiny_vit)
    out_of_reach = {**SMALL["ssl_cleanse"], "success": 1.1}
    repaired = repair_ssl_cleanse(encoder, images, disable_tqdm=True, **out_of_reach)
    assert (repaired.steps, repaired.trigger) == (0, None)
    assert largest_difference(weights_of(repaired.model), before) == 0
    assert repaired.forward_equivalents > 16
    with pytest.raises(ValueError, match="`clusters=1` leaves no other cluster"):
        repair_ssl_cleanse(encoder, images, clusters=1, batch_size=8)


def test_unlearning_brings_stamped_inputs_to_clean_features(tiny_vit, processor, images):
    encoder = Encoder(tiny_vit, processor)
    settings = {**SMALL["ssl_cleanse"], "max_steps": 30, "epochs": 15, "learning_rate": 1e-3}
    repaired = repair_ssl_cleanse(encoder, images, disable_tqdm=True, **settings)
    wanted = encoder.encode(images)
    stamped = [repaired.trigger.apply(image) for image in images]
    before, after = (
        float((encoder.with_model(model).encode(stamped) * wanted).sum(dim=1).mean())
        for model in (tiny_vit, repaired.model)
    )
    held = float((encoder.with_model(repaired.model).encode(images) * wanted).sum(dim=1).mean())
    assert after > before + 0.1
    assert held > 0.9


def test_the_rate_of_the_unlearning_by_hand():
    shares = [share_of_rate(step, 80) for step in (0, 3, 4, 59, 60, 69, 70, 79)]
    assert shares == pytest.approx([0.25, 1.0, 1.0, 1.0, 0.2, 0.2, 0.04, 0.04])


def test_an_inverted_cluster_trigger_works_on_raw_pictures(backdoored):
    encoder = Encoder(backdoored.model().eval(), backdoored.processor)
    images = backdoored.train.inputs[:200]
    features = encoder.encode(images)
    found, spent = cluster_triggers(encoder, images, features, 2, SETTINGS, seed=0, disable_tqdm=True)
    assert spent == 2 * 8 * (3 * 3 * 32 + 64)
    assert all(parameter.requires_grad for parameter in encoder.model.parameters())
    assert found
    centers = torch.stack([features[backdoored.train.labels[:200] == label].mean(dim=0) for label in range(10)])
    for each in found:
        stamped = encoder.encode([each.trigger.apply(image) for image in images])
        # All stamped pictures come to lie together, which the clean ones do not
        assert float(stamped.mean(dim=0).norm()) > 0.8 > float(features.mean(dim=0).norm())
        assert len((stamped @ centers.T).argmax(dim=1).unique()) < 10
        assert each.size == pytest.approx(float(each.trigger.opacity.mean()), abs=1e-5)
