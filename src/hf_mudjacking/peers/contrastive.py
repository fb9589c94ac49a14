# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""The fine-tuning objective of defences that know no labels: two views of an input belong together, others do not."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ..encoder import Encoder
from ..preprocessing import RawInput
from .augmentation import contrastive_view
from .base import AfterStep
from .fine_tuning import fine_tune
from .pictures import ModelPictures
from .text_views import edited


# CLIP's temperature before training; CleanCLIP goes on from the one that its model has learned, which a bare tower lacks.
TEMPERATURE = 0.07


def fine_tune_on_views(
    student: Encoder,
    clean_inputs: Sequence[RawInput],
    loss: Callable[[dict[str, Tensor]], Tensor],
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    *,
    steps: int,
    batch_size: int,
    forwards_per_input: int,
    spent: int = 0,
    seed: int,
    after_step: AfterStep,
    desc: str,
    disable_tqdm: bool,
) -> int:
    """[`~hf_mudjacking.peers.fine_tuning.fine_tune`] on two augmented views of each clean input.

    Args:
        student (`Encoder`): Encoder whose model is trained, in place.
        clean_inputs (`Sequence[PIL.Image.Image]` or `Sequence[str]`): Clean inputs.
        loss (`Callable`): Takes the model inputs of [`two_views`] or [`two_text_views`], gives a scalar.
        seed (`int`): Seed of the order and of the views.
        optimizer, schedule, steps, batch_size, forwards_per_input, spent, after_step, desc, disable_tqdm: As there.

    Returns:
        `int`: Forward equivalents spent, those before included.
    """
    generator = torch.Generator().manual_seed(seed)
    if student.modality == "image":
        pictures = ModelPictures(student)
        views = two_views(pictures, pictures.prepare(clean_inputs), generator)
    else:
        views = two_text_views(student, clean_inputs, generator)
    return fine_tune(
        student.model,
        len(clean_inputs),
        views,
        loss,
        optimizer,
        schedule,
        steps=steps,
        batch_size=batch_size,
        forwards_per_input=forwards_per_input,
        spent=spent,
        generator=generator,
        after_step=after_step,
        desc=desc,
        disable_tqdm=disable_tqdm,
    )


def two_views(
    pictures: ModelPictures, prepared: Tensor, generator: torch.Generator
) -> Callable[[Tensor], dict[str, Tensor]]:
    """Of row numbers `(B,)`, model inputs `(2 · B, C, H, W)`: one view of each picture, then another of each."""

    def views(rows: Tensor) -> dict[str, Tensor]:
        shown = pictures.shown(prepared[rows.to(prepared.device, non_blocking=True)])
        return pictures.inputs(torch.cat([contrastive_view(shown, generator) for _ in range(2)]))

    return views


def two_text_views(
    encoder: Encoder, texts: Sequence[str], generator: torch.Generator
) -> Callable[[Tensor], dict[str, Tensor]]:
    """Of row numbers `(B,)`, model inputs of 2 · B texts: one view of each text, then another of each."""

    def views(rows: Tensor) -> dict[str, Tensor]:
        chosen = [texts[i] for i in rows.tolist()]
        return encoder.preprocess([edited(text, generator) for text in (*chosen, *chosen)])

    return views


def nt_xent(features: Tensor, temperature: float) -> Tensor:
    """Normalised temperature-scaled cross entropy (SimCLR, Chen et al., ICML 2020).

    For each of 2 · B views, minus the log share of its partner in the sum of exp(cos / τ) over all other views; their mean.

    Args:
        features (`FloatTensor` of shape `(2 * B, D)`): L2-normalised; rows i and i + B are views of one input.
        temperature (`float`): τ.

    Returns:
        `Tensor`: Scalar.
    """
    count = len(features)
    logits = features @ features.T / temperature
    logits = logits.masked_fill(torch.eye(count, dtype=torch.bool, device=features.device), -torch.inf)
    return cross_entropy(logits, torch.arange(count, device=features.device).roll(count // 2))
