# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""The three losses of Mudjacking, as functions of feature tensors.

Notation: h is the frozen, backdoored encoder, h' the encoder being patched, x a clean validation input, x ⊕ e the same
input carrying the inverted trigger, (x_b, x_r) the bug instance. All similarities are cosines, averaged over rows.
Source: Liu, Reiter, Gong, "Mudjacking: Patching Backdoor Vulnerabilities in Foundation Models", USENIX Security 2024,
and the authors' released code (tdczlhb/Mudjacking, commit ad8735a), where the x_r terms weigh as much as a whole mean
over the validation inputs; here that weight is `reference_weight`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity


class MudjackingLosses(NamedTuple):
    """Scalar tensors: the weighted sum and its three parts."""

    total: Tensor
    effectiveness: Tensor
    locality: Tensor
    generalizability: Tensor


def mean_cosine(a: Tensor, b: Tensor) -> Tensor:
    """Mean over rows of the cosine similarity of two `(N, D)` float tensors, computed in float32."""
    return cosine_similarity(a.float(), b.float(), dim=-1).mean()


def effectiveness_loss(misclassified: Tensor, reference: Tensor, ceiling: Tensor | None = None) -> Tensor:
    """L_e = -cos(h'(x_b), h'(x_r)): the bug instance must look like its reference.

    Two texts of one class may have little in common. Where it is known how near x_b comes to x_r without its trigger,
    `ceiling` says so, and nothing is gained by coming nearer: L_e = max(ceiling - cos(h'(x_b), h'(x_r)), 0) - 1, which is
    the formula above for a ceiling of 1.

    Args:
        misclassified (`Tensor` of shape `(K, D)`): Patched features of the K misclassified inputs.
        reference (`Tensor` of shape `(K, D)`): Patched features of their references.
        ceiling (`Tensor` of shape `(K,)`, *optional*): Cosine to be reached; 1 when absent.

    Returns:
        `Tensor`: Scalar in [-1, 1].
    """
    if ceiling is None:
        return -mean_cosine(misclassified, reference)
    cosines = cosine_similarity(misclassified.float(), reference.float(), dim=-1)
    return (ceiling - cosines).clamp_min(0).mean() - 1


def locality_loss(
    clean: Tensor, frozen: Tensor, reference: Tensor, frozen_reference: Tensor, reference_weight: float = 1.0
) -> Tensor:
    """L_l = -mean cos(h'(x), h(x)) - w · cos(h'(x_r), h(x_r)): all else must stay as it was.

    Args:
        clean (`Tensor` of shape `(B, D)`): Patched features of clean inputs.
        frozen (`Tensor` of shape `(B, D)`): Frozen features of the same inputs.
        reference (`Tensor` of shape `(K, D)`): Patched features of the references.
        frozen_reference (`Tensor` of shape `(K, D)`): Frozen features of the references.
        reference_weight (`float`, *optional*, defaults to 1.0): Weight w of the reference term.

    Returns:
        `Tensor`: Scalar in [-1 - w, 1 + w].
    """
    return -mean_cosine(clean, frozen) - reference_weight * mean_cosine(reference, frozen_reference)


def generalizability_loss(
    stamped: Tensor, clean: Tensor, stamped_reference: Tensor, reference: Tensor, reference_weight: float = 1.0
) -> Tensor:
    """L_g = -mean cos(h'(x ⊕ e), h(x)) - w · cos(h'(x_r ⊕ e), h(x_r)): the trigger must do nothing.

    The released code has h' on both sides: pulling the stamped side to the clean one, it also pulls the clean side to the
    stamped one, against the locality loss. [`MudjackingTrainer`] passes the frozen features, which stay. On a ResNet for CIFAR-10
    and traffic signs (BadEncoder, one report, 600 steps) BA then ends at 75.5 instead of 75.3 and at 89.9 instead of 89.6, with a
    classifier trained anew at 75.9 instead of 75.4 and at 90.0 instead of 89.8 (75.9 and 90.0 before); RA is 0.1 to 0.3 lower. On
    digits (three seeds, 300 steps) BA is the same within 0.3 points and RA 0 to 0.6 lower.

    Args:
        stamped (`Tensor` of shape `(B, D)`): Patched features of clean inputs carrying the trigger.
        clean (`Tensor` of shape `(B, D)`): Features of the same inputs without it, frozen or patched.
        stamped_reference (`Tensor` of shape `(K, D)`): Patched features of the references carrying their triggers.
        reference (`Tensor` of shape `(K, D)`): Features of the references, frozen or patched.
        reference_weight (`float`, *optional*, defaults to 1.0): Weight w of the reference term.

    Returns:
        `Tensor`: Scalar in [-1 - w, 1 + w].
    """
    return -mean_cosine(stamped, clean) - reference_weight * mean_cosine(stamped_reference, reference)


def mudjacking_loss(
    effectiveness: Tensor,
    locality: Tensor,
    generalizability: Tensor,
    locality_weight: float = 1.0,
    generalizability_weight: float = 1.0,
) -> MudjackingLosses:
    """L = L_e + λ_l · L_l + λ_g · L_g.

    Args:
        effectiveness, locality, generalizability (`Tensor`): The three scalar losses.
        locality_weight (`float`, *optional*, defaults to 1.0): λ_l.
        generalizability_weight (`float`, *optional*, defaults to 1.0): λ_g.

    Returns:
        `MudjackingLosses`: The sum and its parts.
    """
    total: torch.Tensor = effectiveness + locality_weight * locality + generalizability_weight * generalizability
    return MudjackingLosses(total, effectiveness, locality, generalizability)
