# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""Losses against values worked out by hand: vectors at known angles."""

import math

import pytest
import torch
from torch import tensor

from hf_mudjacking.losses import (
    effectiveness_loss,
    generalizability_loss,
    locality_loss,
    mean_cosine,
    mudjacking_loss,
)


EAST = tensor([[1.0, 0.0]])
NORTH = tensor([[0.0, 1.0]])
WEST = -EAST
SIXTY = tensor([[0.5, math.sqrt(3) / 2]])  # 60 degrees from east, 30 from north


@pytest.mark.parametrize(
    ("a", "b", "cosine"),
    [(EAST, EAST, 1.0), (EAST, NORTH, 0.0), (EAST, WEST, -1.0), (EAST, SIXTY, 0.5), (NORTH, SIXTY, math.sqrt(3) / 2)],
)
def test_mean_cosine_of_known_angles(a, b, cosine):
    assert mean_cosine(a, b).item() == pytest.approx(cosine, abs=1e-6)
    assert mean_cosine(7 * a, 0.01 * b).item() == pytest.approx(cosine, abs=1e-6)
    assert effectiveness_loss(a, b).item() == pytest.approx(-cosine, abs=1e-6)


def test_mean_cosine_averages_over_rows():
    a, b = torch.cat([EAST, EAST, EAST, EAST]), torch.cat([EAST, NORTH, WEST, SIXTY])
    assert mean_cosine(a, b).item() == pytest.approx((1 + 0 - 1 + 0.5) / 4, abs=1e-6)


def test_half_precision_is_computed_in_float32():
    assert mean_cosine(EAST.half(), SIXTY.half()).dtype == torch.float32
    assert mean_cosine(EAST.bfloat16(), SIXTY).item() == pytest.approx(0.5, abs=1e-6)


@pytest.mark.parametrize("weight", [0.0, 0.25, 1.0, 3.0])
def test_locality(weight):
    clean, frozen = torch.cat([EAST, EAST]), torch.cat([EAST, SIXTY])  # mean 0.75
    loss = locality_loss(clean, frozen, NORTH, SIXTY, weight)
    assert loss.item() == pytest.approx(-0.75 - weight * math.sqrt(3) / 2, abs=1e-6)


@pytest.mark.parametrize("weight", [0.0, 0.25, 1.0, 3.0])
def test_generalizability(weight):
    stamped, clean = torch.cat([NORTH, WEST]), torch.cat([EAST, EAST])  # mean -0.5
    loss = generalizability_loss(stamped, clean, SIXTY, EAST, weight)
    assert loss.item() == pytest.approx(0.5 - weight * 0.5, abs=1e-6)


def test_reference_weight_is_one_by_default():
    assert locality_loss(EAST, NORTH, EAST, EAST).item() == pytest.approx(-1)
    assert generalizability_loss(EAST, NORTH, EAST, EAST).item() == pytest.approx(-1)


def test_reference_counts_as_much_as_all_inputs_together():
    many = EAST.repeat(50, 1)
    loss = locality_loss(many, many, EAST, NORTH, 1.0)
    assert loss.item() == pytest.approx(-1 - 0, abs=1e-6)
    assert locality_loss(many, NORTH.repeat(50, 1), EAST, EAST, 1.0).item() == pytest.approx(-1, abs=1e-6)


def test_total_with_weights():
    losses = mudjacking_loss(tensor(-0.5), tensor(-1.5), tensor(0.25), locality_weight=2.0, generalizability_weight=4)
    assert losses.total.item() == pytest.approx(-0.5 - 3.0 + 1.0)
    assert [x.item() for x in losses[1:]] == [-0.5, -1.5, 0.25]
    assert mudjacking_loss(tensor(-0.5), tensor(-1.5), tensor(0.25)).total.item() == pytest.approx(-1.75)


def test_gradient_flows_into_both_sides_of_generalizability():
    stamped, clean, stamped_reference, reference = (x.clone().requires_grad_() for x in (NORTH, SIXTY, NORTH, SIXTY))
    generalizability_loss(stamped, clean, stamped_reference, reference).backward()
    # d(-cos)/da for unit vectors is -(b - cos · a): the part of the other vector at right angles to this one.
    cosine = math.sqrt(3) / 2
    torch.testing.assert_close(stamped.grad, -(SIXTY - cosine * NORTH))
    torch.testing.assert_close(clean.grad, -(NORTH - cosine * SIXTY))
    torch.testing.assert_close(stamped_reference.grad, stamped.grad)
    torch.testing.assert_close(reference.grad, clean.grad)


def test_gradient_flows_into_both_sides_of_effectiveness():
    misclassified, reference = EAST.clone().requires_grad_(), SIXTY.clone().requires_grad_()
    effectiveness_loss(misclassified, reference).backward()
    torch.testing.assert_close(misclassified.grad, -(SIXTY - 0.5 * EAST))
    torch.testing.assert_close(reference.grad, -(EAST - 0.5 * SIXTY))


def test_gradient_of_the_mean_is_shared_by_the_rows():
    clean = torch.cat([EAST, EAST]).requires_grad_()
    locality_loss(clean, torch.cat([NORTH, EAST]), EAST, EAST).backward()
    torch.testing.assert_close(clean.grad, torch.cat([-NORTH / 2, torch.zeros(1, 2)]))
