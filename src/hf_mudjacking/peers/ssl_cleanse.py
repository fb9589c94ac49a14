# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""SSL-Cleanse (Zheng et al., ECCV 2024): find the trigger without a report, and unlearn it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from ..attacks.implant import nameless_copy
from ..bug_instance import BugInstance
from ..encoder import Encoder
from ..losses import mean_cosine
from .base import AfterStep, PeerRepair, nothing
from .cluster_inversion import ClusterTrigger, SearchSettings, cluster_triggers, outlying
from .fine_tuning import fine_tune, number_of_steps, prepared_for_training
from .pictures import ModelPictures


# The rate falls to a fifth at these shares of the steps: the last 50 and 25 of 200 epochs in the released code.
_MILESTONES, _FALL = (3 / 4, 7 / 8), 0.2
_WARMUP_STEPS = 500


def repair_ssl_cleanse(
    encoder: Encoder,
    clean_inputs: Sequence[Image.Image],
    bug: BugInstance | None = None,
    *,
    clusters: int = 10,
    rounds: int = 100,
    steps_per_round: int = 3,
    inversion_batch_size: int = 32,
    inversion_learning_rate: float = 0.1,
    success: float = 0.99,
    first_price: float = 0.1,
    price_factor: float = 1.5,
    patience: int = 5,
    learning_rate: float = 1e-3,
    weight_decay: float = 1e-6,
    epochs: int = 200,
    batch_size: int = 512,
    max_steps: int | None = None,
    seed: int = 0,
    disable_tqdm: bool = False,
    after_step: AfterStep = nothing,
) -> PeerRepair:
    """Invert a trigger for each cluster of clean features, and unlearn those that are suspiciously small; no report.

    In spirit SSL-Cleanse, on one encoder without its projection head. Clean features are clustered by k-means. For each cluster
    a mask and a pattern are optimised that carry inputs of the others to its centre, at a price for the mask that rises while
    they arrive. Clusters whose mask is an outlier below the median (median absolute deviation) hold a trigger. If none is an
    outlier, the smallest mask is taken for the trigger, for a repair was asked for; if no mask works in any cluster, the copy
    comes back as it was, with no trigger.

    Then cos(h'(x ⊕ e), h(x)) + cos(h'(x), h(x)) is maximised with Adam: stamped inputs get the features of the clean ones, and
    clean ones keep theirs. With several outliers each batch has one of them, by turns.

    The search costs at most `clusters * rounds * (3 * steps_per_round * inversion_batch_size + 64)` forward equivalents, the
    features one for each clean input, and each clean input 6 a step. Where the release chooses the number of clusters (sliding
    window Kneedle), it is a setting here, and its search is longer: 1,000 epochs of 1 % of ImageNet-100.

    Args:
        encoder (`Encoder`): Backdoored vision encoder; it is not changed.
        clean_inputs (`Sequence[PIL.Image.Image]`): Clean inputs, unlabelled.
        bug (`BugInstance`, *optional*): Ignored.
        clusters (`int`, *optional*, defaults to 10): Clusters of clean features; 2 or more.
        rounds (`int`, *optional*, defaults to 100): Rounds of each search, with a look at the success after each.
        steps_per_round (`int`, *optional*, defaults to 3): Adam's steps in a round.
        inversion_batch_size (`int`, *optional*, defaults to 32): Inputs a step of the search (released README).
        inversion_learning_rate (`float`, *optional*, defaults to 0.1): Of Adam, β = (0.5, 0.9) (released code).
        success (`float`, *optional*, defaults to 0.99): Share of inputs that must reach the cluster (released README).
        first_price (`float`, *optional*, defaults to 0.1): First price of the mask (released README).
        price_factor (`float`, *optional*, defaults to 1.5): By what it rises and falls (released code).
        patience (`int`, *optional*, defaults to 5): Rounds in a row after which it does (released code).
        learning_rate (`float`, *optional*, defaults to 1e-3): Adam's in the unlearning, after a warm-up; falls to a fifth after
            three quarters of the steps, and again after seven eighths (released code).
        weight_decay (`float`, *optional*, defaults to 1e-6): Adam's (released code).
        epochs (`int`, *optional*, defaults to 200): Passes over the clean inputs (released code).
        batch_size (`int`, *optional*, defaults to 512): Clean inputs a step (released code).
        max_steps (`int`, *optional*): Steps after which it ends, with the schedule shortened to them.
        seed (`int`, *optional*, defaults to 0): Seed of the clusters, the search and the order.
        disable_tqdm (`bool`, *optional*, defaults to `False`): Whether to hide progress bars.
        after_step (`Callable`, *optional*): Called with the model, the steps done and the forward equivalents so far, those of
            the search included.

    Returns:
        `PeerRepair`: The copy, and the smallest of the triggers that were unlearned.

    Raises:
        ValueError: If the encoder takes texts, there are fewer clean inputs than a batch takes, fewer than 2 clusters, or the
            image processor does more than resize, crop and normalise.
    """
    if clusters < 2:
        raise ValueError(f"`clusters={clusters}` leaves no other cluster to come from. Pass 2 or more.")
    steps = number_of_steps(len(clean_inputs), batch_size, epochs, max_steps)
    cleansed = encoder.with_model(nameless_copy(encoder.model))
    pictures = ModelPictures(cleansed)
    parameters = prepared_for_training(cleansed.model)
    features = cleansed.encode(clean_inputs, disable_tqdm=disable_tqdm, desc="Clean features")
    settings = SearchSettings(
        rounds,
        steps_per_round,
        inversion_batch_size,
        inversion_learning_rate,
        success,
        first_price,
        price_factor,
        patience,
    )
    found, spent = cluster_triggers(cleansed, clean_inputs, features, clusters, settings, seed, disable_tqdm)
    spent += len(features)
    suspects = suspicious(found, clusters)
    if not suspects:
        return PeerRepair(cleansed.model, 0, spent)

    x = pictures.prepare(clean_inputs)
    stamped = [pictures.prepare(clean_inputs, suspect.trigger) for suspect in suspects]
    features = features.to(cleansed.device)
    turn = 0

    def views(rows: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        nonlocal turn
        both = torch.cat([x[rows], stamped[turn % len(stamped)][rows]])
        turn += 1
        return pictures.inputs(pictures.shown(both)), features[rows]

    def loss(batch: tuple[dict[str, Tensor], Tensor]) -> Tensor:
        inputs, wanted = batch
        clean, triggered = cleansed.features(inputs).chunk(2)
        return -mean_cosine(triggered, wanted) - mean_cosine(clean, wanted)

    optimizer = torch.optim.Adam(parameters, lr=learning_rate, weight_decay=weight_decay)
    spent = fine_tune(
        cleansed.model,
        len(clean_inputs),
        views,
        loss,
        optimizer,
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: share_of_rate(step, steps)),
        steps=steps,
        batch_size=batch_size,
        forwards_per_input=6,
        spent=spent,
        generator=torch.Generator().manual_seed(seed),
        after_step=after_step,
        desc="Unlearning",
        disable_tqdm=disable_tqdm,
    )
    return PeerRepair(cleansed.model, steps, spent, suspects[0].trigger)


def suspicious(found: Sequence[ClusterTrigger], clusters: int) -> list[ClusterTrigger]:
    """The triggers that are outliers among all clusters, smallest first; where there are none, the smallest.

    A cluster that nothing leads into counts with a mask over the whole picture, as in the released code.
    """
    by_size = sorted(found, key=lambda each: each.size)
    sizes = [each.size for each in by_size] + [1.0] * (clusters - len(found))
    outliers = [by_size[number] for number in outlying(sizes) if number < len(by_size)]
    return outliers or by_size[:1]


def share_of_rate(step: int, steps: int) -> float:
    """What the learning rate is multiplied by: a warm-up of at most 500 steps and a twentieth of all, and two falls."""
    warmup = min(_WARMUP_STEPS, steps // 20)
    rise = (step + 1) / warmup if step < warmup else 1.0
    return rise * _FALL ** sum(step >= milestone * steps for milestone in _MILESTONES)
