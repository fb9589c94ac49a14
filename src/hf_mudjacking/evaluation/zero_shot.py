# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""What clients do with a model of two towers without training anything: zero-shot classification and retrieval."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..encoder import Encoder
from .checks import TaskFeatures
from .tasks import DownstreamTask


class ZeroShotClassifier:
    """Predicts the class whose prompts are nearest: Radford et al., "Learning Transferable Visual Models", ICML 2021.

    Args:
        class_features (`FloatTensor` of shape `(C, D)`): Feature of each class, L2-normalised.
    """

    def __init__(self, class_features: Tensor) -> None:
        self.class_features = class_features

    @classmethod
    def from_prompts(
        cls, text_encoder: Encoder, class_names: Sequence[str], templates: Sequence[str] = ("a photo of a {}.",)
    ) -> ZeroShotClassifier:
        """Build it from names: the feature of a class is the mean over its prompts.

        Args:
            text_encoder (`Encoder`): The text tower (`Encoder(model, processor, modality="text")`).
            class_names (`Sequence[str]`): C names, in the order of the labels.
            templates (`Sequence[str]`, *optional*): Prompts with `{}` where the name goes.

        Raises:
            TypeError: If names or templates are a single text.
            ValueError: If the encoder takes no texts, there are no names or templates, or a template has no place for one.
        """
        if text_encoder.modality != "text":
            raise ValueError("`text_encoder` takes images; pass the text tower: `Encoder(..., modality='text')`.")
        for what, given in (("class_names", class_names), ("templates", templates)):
            if isinstance(given, str):
                raise TypeError(f"`{what}` is a single text; pass a list of them.")
        if len(class_names) < 2 or not templates:
            raise ValueError(
                f"There are {len(class_names)} class names and {len(templates)} templates; at least two names and one "
                "template are needed."
            )
        without = [template for template in templates if "{}" not in template]
        if without:
            raise ValueError(f"The template {without[0]!r} has no `{{}}` where the name of the class would go.")
        prompts = [template.replace("{}", name) for name in class_names for template in templates]
        features = text_encoder.encode(prompts).reshape(len(class_names), len(templates), -1)
        return cls(normalize(features.mean(dim=1), dim=1))

    def predict(self, features: np.ndarray) -> np.ndarray:
        """Classes `(N,)` for features `(N, D)`."""
        return (torch.as_tensor(features, dtype=torch.float32) @ self.class_features.T).argmax(dim=1).numpy()


def retrieval_recall(
    queries: Tensor, gallery: Tensor, query_ids: np.ndarray, gallery_ids: np.ndarray, k: int = 1
) -> float:
    """Recall@k: share of queries with an item of their own id among the k nearest of a gallery.

    Args:
        queries (`FloatTensor` of shape `(N, D)`): Features that are looked for.
        gallery (`FloatTensor` of shape `(M, D)`): Features that are looked through.
        query_ids (`np.ndarray` of shape `(N,)`): What each query shows: its pair, or its class.
        gallery_ids (`np.ndarray` of shape `(M,)`): What each item of the gallery shows.
        k (`int`, *optional*, defaults to 1): Items that count.

    Raises:
        ValueError: If k is not between 1 and the size of the gallery.
    """
    return float((_nearest(queries, gallery, gallery_ids, k) == np.asarray(query_ids)[:, None]).any(axis=1).mean())


def retrieval_rates(
    features: TaskFeatures, task: DownstreamTask, captions: Tensor, caption_ids: np.ndarray, target: int
) -> dict[str, float]:
    """Retrieval at rank 1 between the test images of a task and captions of its classes.

    Args:
        features (`TaskFeatures`): Features of the vision tower under test.
        task (`DownstreamTask`): The task, for its test labels.
        captions (`FloatTensor` of shape `(M, D)`): Features of captions.
        caption_ids (`np.ndarray` of shape `(M,)`): Class that each caption names.
        target (`int`): Target class; ASR and RA are measured on images of other classes.

    Returns:
        `dict`: `image_to_text` and `text_to_image`, recall@1 on clean images; `RA`, recall@1 of triggered images as queries;
        `ASR`, the share of them whose nearest caption names the target class.

    Raises:
        ValueError: If all test images are of the target class.
    """
    truth = task.test.labels
    other = truth != target
    if not other.any():
        raise ValueError(f"All test images are of the target class {target}; ASR and RA need others.")
    found = _nearest(features.stamped[torch.as_tensor(other)], captions, caption_ids, 1)[:, 0]
    return {
        "image_to_text": retrieval_recall(features.test, captions, truth, caption_ids),
        "text_to_image": retrieval_recall(captions, features.test, caption_ids, truth),
        "RA": float((found == truth[other]).mean()),
        "ASR": float((found == target).mean()),
    }


def _nearest(queries: Tensor, gallery: Tensor, gallery_ids: np.ndarray, k: int) -> np.ndarray:
    """Ids `(N, k)` of the nearest items."""
    if not 1 <= k <= len(gallery):
        raise ValueError(f"`k={k}` is out of reach; the gallery has {len(gallery)} items.")
    return np.asarray(gallery_ids)[(queries @ gallery.T).topk(k, dim=1).indices.numpy()]
