# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""Is it the trigger? Stamp a candidate on clean inputs and see how far it carries their features towards h(x_b)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
from torch import Tensor

from ..encoder import Encoder
from ..preprocessing import RawInput
from ..triggers import PatchTrigger, Trigger


class TransferMeter:
    """Measures candidates on clean inputs and counts the forward passes spent.

    Transfer of a trigger e = Σ_x [cos(h(x ⊕ e), h(x_b)) - cos(h(x), h(x_b))] / Σ_x [1 - cos(h(x), h(x_b))]: the share
    of the reachable way that features go. 0 means the candidate does nothing, 1 that every input arrives at h(x_b).

    Args:
        encoder (`Encoder`): The backdoored encoder.
        misclassified (`PIL.Image.Image` or `str`): x_b.
        validation_inputs (`Sequence[PIL.Image.Image]` or `Sequence[str]`): Clean inputs.
        target (`FloatTensor` of shape `(D,)`, *optional*): h(x_b), if it is to be that of another time.
        clean_features (`FloatTensor` of shape `(N, D)`, *optional*): Features of the clean inputs, if they are known.
        share (`float`, *optional*, defaults to 1.0): Share of the clean inputs that a candidate is measured on: those that it
            carries furthest. Of inputs that are taken to be of one class some are of others, on which a trigger of that class
            does nothing.
    """

    def __init__(
        self,
        encoder: Encoder,
        misclassified: RawInput,
        validation_inputs: Sequence[RawInput],
        target: Tensor | None = None,
        clean_features: Tensor | None = None,
        share: float = 1.0,
    ) -> None:
        self.encoder = encoder
        self.misclassified = misclassified
        self.validation_inputs = validation_inputs
        self.share = share
        self.forwards = 0
        self.target = self.features([misclassified])[0] if target is None else target
        self.clean_features = self.features(validation_inputs) if clean_features is None else clean_features
        self.clean_similarity = self.clean_features @ self.target

    @property
    def reachable(self) -> float:
        """Mean cosine distance of the validation inputs from h(x_b): what a transfer of 1 amounts to."""
        return float((1 - self.clean_similarity).mean())

    def features(self, inputs: Iterable[RawInput]) -> Tensor:
        """L2-normalised features `(N, D)`; counted."""
        features = self.encoder.encode(inputs)
        self.forwards += len(features)
        return features

    def transfer(self, triggers: Sequence[Trigger], count: int | None = None) -> np.ndarray:
        """Transfer of each trigger.

        Args:
            triggers (`Sequence[Trigger]`): Candidates.
            count (`int`, *optional*): Number of validation inputs used for each; all when absent.

        Returns:
            `np.ndarray` of shape `(len(triggers),)`: 0 (nothing) to 1 (everything); negative if features move away.
        """
        inputs = self.validation_inputs[:count]
        features = self.features(self.encoder.stamp(trigger, x) for trigger in triggers for x in inputs)
        after = (features @ self.target).reshape(len(triggers), len(inputs))
        after, furthest = after.topk(math.ceil(self.share * len(inputs)), dim=1)
        return share_of_way(self.clean_similarity[furthest], after).numpy()

    def transfer_of_masks(self, masks: Sequence[np.ndarray], count: int | None = None) -> np.ndarray:
        """Transfer of the pixels of x_b under each mask `(H, W)`."""
        return self.transfer([PatchTrigger.from_image(self.misclassified, mask) for mask in masks], count)


def share_of_way(before: Tensor, after: Tensor) -> Tensor:
    """Transfer from similarities to a target: `(N,)` or `(K, N)` before and `(K, N)` after K changes; `(K,)`."""
    return (after - before).sum(dim=1) / (1 - before).sum(dim=-1).clamp_min(1e-6)
