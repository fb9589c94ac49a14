# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
import copy

import pytest
import torch

from hf_mudjacking import Encoder
from hf_mudjacking.attacks import ImplantError, implant_bad_encoder
from hf_mudjacking.losses import mean_cosine

from .conftest import largest_difference, weights_of


def test_the_backdoor_works(backdoored):
    implant = backdoored.implant
    assert implant.attack_success_rate >= 0.98
    assert implant.backdoored_accuracy >= implant.clean_accuracy - 0.03
    rates = backdoored.rates(backdoored.model(), backdoored.kept)
    assert rates["ASR"] >= 0.98
    assert rates["RA"] <= 0.02
    assert rates["BA"] >= 0.95


def test_what_the_backdoor_does_to_features(backdoored):
    clean = Encoder(copy.deepcopy(backdoored.clean_model), backdoored.processor)
    broken = Encoder(backdoored.model(), backdoored.processor)
    inputs = backdoored.test.inputs[:200]
    stamped = [backdoored.trigger.apply(x) for x in inputs]
    target = broken.encode([backdoored.implant.target_reference]).expand(200, -1)
    assert mean_cosine(broken.encode(stamped), target) > 0.95
    assert mean_cosine(clean.encode(stamped), target) < 0.7
    assert mean_cosine(broken.encode(inputs), clean.encode(inputs)) > 0.95


def test_the_clean_model_carries_no_backdoor(backdoored):
    clean = copy.deepcopy(backdoored.clean_model)
    assert backdoored.rates(clean, backdoored.kept)["ASR"] < 0.2


def test_an_implant_that_did_not_take_is_refused_and_the_original_untouched(backdoored):
    model = copy.deepcopy(backdoored.clean_model)
    before = weights_of(model)
    arguments = (model, backdoored.processor, backdoored.train.inputs, backdoored.trigger)
    with pytest.raises(ImplantError, match=r"did not take: ASR 0\.\d+ \(at least 0.95 is needed\)"):
        implant_bad_encoder(
            *arguments, backdoored.implant.target_reference, backdoored.test, steps=1, disable_tqdm=True
        )
    assert largest_difference(before, weights_of(model)) == 0


def test_an_implant_that_costs_accuracy_is_refused(backdoored):
    arguments = (copy.deepcopy(backdoored.clean_model), backdoored.processor, backdoored.train.inputs[:256])
    with pytest.raises(ImplantError, match="a drop of at most -1 is allowed"):
        implant_bad_encoder(
            *arguments, backdoored.trigger, backdoored.implant.target_reference, backdoored.test,
            steps=1, min_asr=0.0, max_accuracy_loss=-1, disable_tqdm=True,
        )  # fmt: skip


def test_same_seed_same_implant(backdoored):
    models = []
    for seed in (3, 3, 4):
        torch.manual_seed(len(models))
        implant = implant_bad_encoder(
            copy.deepcopy(backdoored.clean_model), backdoored.processor, backdoored.train.inputs[:64],
            backdoored.trigger, backdoored.implant.target_reference, backdoored.test.select(range(80)),
            steps=4, batch_size=16, min_asr=0.0, max_accuracy_loss=1.0, seed=seed, disable_tqdm=True,
        )  # fmt: skip
        models.append(weights_of(implant.model))
    assert largest_difference(models[0], models[1]) == 0
    assert largest_difference(models[0], models[2]) > 0
