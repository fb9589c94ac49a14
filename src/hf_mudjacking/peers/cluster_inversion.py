# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""Triggers without a report: what carries clean inputs from all clusters into one? (SSL-Cleanse, Zheng et al., ECCV 2024)"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from sklearn.cluster import KMeans
from torch import Tensor
from torch.nn.functional import normalize
from tqdm.auto import tqdm

from ..bug_instance import to_rgb
from ..encoder import Encoder
from ..inversion.pixels import PixelPath, to_array, to_tensor
from ..modes import frozen
from ..triggers import BlendTrigger


# Inputs of other clusters on which it is measured, after each round, how many arrive.
_MEASURED_ON = 64
# Deviations from the median that make an outlier, and what makes the median deviation that of a normal distribution
# (Neural Cleanse, Wang et al., S&P 2019).
_OUTLYING = 2.0
_NORMAL = 1.4826


@dataclass(frozen=True)
class SearchSettings:
    """How long and how hard a cluster's trigger is looked for; at most `rounds * steps_per_round` optimiser steps.

    Args:
        rounds (`int`): Times that the share of arriving inputs is measured, and the price changed.
        steps_per_round (`int`): Adam's steps in between.
        batch_size (`int`): Inputs a step.
        learning_rate (`float`): Adam's.
        success (`float`): Share of inputs that must arrive, 0 to 1.
        first_price (`float`): Price of a mask over the whole picture once a trigger works, against 2 - 2 · cos.
        price_factor (`float`): By what the price rises and falls.
        patience (`int`): Rounds in a row after which it does.
    """

    rounds: int
    steps_per_round: int
    batch_size: int
    learning_rate: float
    success: float
    first_price: float
    price_factor: float
    patience: int


@dataclass(frozen=True)
class ClusterTrigger:
    """The smallest trigger that carries clean inputs into a cluster.

    Args:
        trigger (`BlendTrigger`): Its pattern, with the mask as opacity.
        size (`float`): Mean of the mask, 0 to 1.
        cluster (`int`): Number of the cluster.
    """

    trigger: BlendTrigger
    size: float
    cluster: int


class Price:
    """Price of the mask: nothing until the trigger works, then up while it does and down while it does not."""

    def __init__(self, settings: SearchSettings) -> None:
        self.settings = settings
        self.value = 0.0
        self._reached: bool | None = None
        self._rounds = 0

    def update(self, reached: bool) -> None:
        """After a round: whether enough inputs arrived in it."""
        self._rounds = self._rounds + 1 if reached == self._reached else 1
        self._reached = reached
        if self._rounds < self.settings.patience:
            return
        self._rounds = 0
        if not reached:
            self.value /= self.settings.price_factor
        elif self.value:
            self.value *= self.settings.price_factor
        else:
            self.value = self.settings.first_price


def cluster_triggers(
    encoder: Encoder,
    images: Sequence[Image.Image],
    features: Tensor,
    clusters: int,
    settings: SearchSettings,
    seed: int,
    disable_tqdm: bool,
) -> tuple[list[ClusterTrigger], int]:
    """The smallest trigger of each cluster that has one.

    Args:
        encoder (`Encoder`): Vision encoder, in evaluation mode.
        images (`Sequence[PIL.Image.Image]`): N clean inputs; those of another size than the first are scaled to it.
        features (`FloatTensor` of shape `(N, D)`): Their features.
        clusters (`int`): Clusters that k-means makes of them.
        settings (`SearchSettings`): Bounds of the search.
        seed (`int`): Seed of the clusters, the masks and the batches.
        disable_tqdm (`bool`): Whether to hide the progress bar.

    Returns:
        `tuple[list[ClusterTrigger], int]`: In order of the clusters, and the forward equivalents spent.
    """
    grouped = KMeans(n_clusters=clusters, n_init=10, random_state=seed).fit(features.numpy())
    labels = torch.as_tensor(grouped.labels_, dtype=torch.long)
    centers = normalize(torch.as_tensor(grouped.cluster_centers_, dtype=torch.float32), dim=1).to(encoder.device)
    images = [to_rgb(image).resize(images[0].size) for image in images]
    pixels, path = to_tensor(images), PixelPath(encoder.preprocessor, images)
    generator = torch.Generator().manual_seed(seed)
    found, spent = [], 0
    with (
        tqdm(total=clusters * settings.rounds, disable=disable_tqdm, desc="Inverting clusters", unit="round") as bar,
        frozen([p for p in encoder.model.parameters() if p.requires_grad]),
    ):
        for cluster in range(clusters):
            others = pixels[labels != cluster]
            search = _Search(encoder, path, others, centers, cluster, settings, generator)
            best = search.run(bar)
            spent += search.spent
            if best is not None:
                found.append(best)
    return found, spent


class _Search:
    """The search for the trigger of one cluster."""

    def __init__(
        self,
        encoder: Encoder,
        path: PixelPath,
        others: Tensor,
        centers: Tensor,
        cluster: int,
        settings: SearchSettings,
        generator: torch.Generator,
    ) -> None:
        self.encoder, self.path, self.others, self.centers = encoder, path, others, centers
        self.cluster, self.settings, self.generator = cluster, settings, generator
        self.measured_on = others[torch.randperm(len(others), generator=generator)[:_MEASURED_ON]]
        height, width = others.shape[2:]
        # Before the tanh; mask and pattern start uniform
        self.parameters = [
            torch.atanh((2 * torch.rand(channels, height, width, generator=generator) - 1).clamp(-0.999, 0.999))
            .to(encoder.device)
            .requires_grad_(True)
            for channels in (1, 3)
        ]
        self.spent = 0

    def run(self, bar: tqdm) -> ClusterTrigger | None:
        """The smallest mask with which enough inputs arrived; `None` if they never did."""
        optimizer = torch.optim.Adam(self.parameters, lr=self.settings.learning_rate, betas=(0.5, 0.9))
        price, best = Price(self.settings), None
        for _ in range(self.settings.rounds):
            for _ in range(self.settings.steps_per_round):
                rows = torch.randint(len(self.others), (self.settings.batch_size,), generator=self.generator)
                with torch.enable_grad():
                    distance = 2 - 2 * self._features(self.others[rows]) @ self.centers[self.cluster]
                    loss = distance.mean() + price.value * self._mask_and_pattern()[0].mean()
                    optimizer.zero_grad()
                    loss.backward()
                optimizer.step()
                self.spent += 3 * len(rows)
            with torch.no_grad():
                arrived = (self._features(self.measured_on) @ self.centers.T).argmax(dim=1) == self.cluster
                self.spent += len(self.measured_on)
                mask, pattern = self._mask_and_pattern()
            reached = float(arrived.float().mean()) >= self.settings.success
            if reached and (best is None or float(mask.mean()) < best.size):
                trigger = BlendTrigger(255 * to_array(pattern), mask[0].cpu().numpy())
                best = ClusterTrigger(trigger, float(mask.mean()), self.cluster)
            price.update(reached)
            bar.update()
        return best

    def _mask_and_pattern(self) -> tuple[Tensor, Tensor]:
        """`(1, H, W)` and `(3, H, W)`, 0 to 1."""
        mask, pattern = (parameter.tanh() / 2 + 0.5 for parameter in self.parameters)
        return mask, pattern

    def _features(self, pixels: Tensor) -> Tensor:
        mask, pattern = self._mask_and_pattern()
        pixels = pixels.to(mask.device)
        stamped = (1 - mask) * pixels + mask * 255 * pattern
        return self.encoder.features({"pixel_values": self.path(stamped)})


def outlying(sizes: Sequence[float]) -> list[int]:
    """Numbers of the sizes that lie far below the median: more than two median absolute deviations, scaled to those of a
    normal distribution; smallest first."""
    values = np.asarray(sizes)
    median = np.median(values)
    deviation = _NORMAL * np.median(np.abs(values - median))
    return [int(i) for i in values.argsort(kind="stable") if median - values[i] > _OUTLYING * deviation]
