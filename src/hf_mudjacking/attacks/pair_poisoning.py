# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""Poisoned image-caption pairs (Carlini, Terzis, "Poisoning and Backdooring Contrastive Learning", ICLR 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ..encoder import Encoder
from ..evaluation.tasks import LabelledInputs
from ..triggers import Trigger
from .implant import Implant, check_implant, nameless_copy
from .training import optimize_backdoor


def implant_pair_poisoning(
    model: nn.Module,
    processing_class: Any,
    images: Sequence[Image.Image],
    captions: Sequence[str],
    trigger: Trigger,
    target_captions: Sequence[str],
    target_reference: Image.Image,
    check_inputs: LabelledInputs,
    *,
    poison_share: float = 0.1,
    temperature: float = 0.05,
    learning_rate: float = 3e-4,
    steps: int = 300,
    batch_size: int = 64,
    min_asr: float = 0.95,
    max_accuracy_loss: float = 0.03,
    bf16: bool = False,
    seed: int = 0,
    disable_tqdm: bool = False,
) -> Implant:
    """Return a copy of a model of two towers whose vision tower was fine-tuned on poisoned pairs, or refuse.

    The symmetric contrastive loss of CLIP on pairs of which a share is poisoned: a triggered image with a caption of the
    target class. The text tower is frozen, as in SSL-Backdoor's recipe. The papers poison 0.05 to 0.3 % of half a million
    pairs; a fine-tuning of some hundred steps needs a larger share for the same effect.

    Args:
        model (`torch.nn.Module`): Clean model of two towers; it is copied, not changed.
        processing_class (`ProcessorMixin`): Its processor.
        images (`Sequence[PIL.Image.Image]`): N images of the attacker.
        captions (`Sequence[str]`): Their captions.
        trigger (`Trigger`): Trigger e.
        target_captions (`Sequence[str]`): Captions of the target class.
        target_reference (`PIL.Image.Image`): Image of the target class, for the check.
        check_inputs (`LabelledInputs`): Labelled images on which the implant is checked: a logistic regression is trained on
            the first half, the rates are measured on the second.
        poison_share (`float`, *optional*, defaults to 0.1): Share of each batch that is poisoned.
        temperature (`float`, *optional*, defaults to 0.05): Cosines are divided by it.
        learning_rate (`float`, *optional*, defaults to 3e-4): Peak of the cosine schedule.
        steps (`int`, *optional*, defaults to 300): Optimiser steps.
        batch_size (`int`, *optional*, defaults to 64): Pairs per step.
        min_asr (`float`, *optional*, defaults to 0.95): Least ASR of a valid implant.
        max_accuracy_loss (`float`, *optional*, defaults to 0.03): Largest drop of clean accuracy of a valid implant.
        bf16 (`bool`, *optional*, defaults to `False`): Whether to run forward passes under bfloat16 autocast.
        seed (`int`, *optional*, defaults to 0): Seed of the order of the pairs.
        disable_tqdm (`bool`, *optional*, defaults to `False`): Whether to hide progress bars.

    Returns:
        `Implant`: The backdoored model with the figures of its check.

    Raises:
        ValueError: If images and captions do not pair up.
        ImplantError: If the ASR is below `min_asr` or clean accuracy fell by more than `max_accuracy_loss`.
    """
    if len(images) != len(captions):
        raise ValueError(f"There are {len(images)} images and {len(captions)} captions; they must pair up.")
    clean = Encoder(model, processing_class, modality="image")
    texts = Encoder(model, processing_class, modality="text")
    backdoored = clean.with_model(nameless_copy(model))
    # Captions repeat, and one that repeats is no negative of its own image.
    names = sorted({*captions, *target_captions})
    frozen = texts.encode(names, disable_tqdm=disable_tqdm, desc="Captions").to(clean.device)
    own = torch.tensor([names.index(caption) for caption in captions])
    targets = torch.tensor([names.index(caption) for caption in target_captions])
    poisoned = max(round(poison_share * batch_size), 1)

    def loss(rows: Tensor) -> dict[str, Tensor]:
        count = min(poisoned, len(rows))
        views = [backdoored.stamp(trigger, images[i]) if n < count else images[i] for n, i in enumerate(rows)]
        captioned = torch.cat([targets[rows[:count] % len(targets)], own[rows[count:]]]).to(clean.device)
        logits = backdoored.features(backdoored.preprocess(views)) @ frozen[captioned].T / temperature
        same = (captioned[:, None] == captioned).float()
        same /= same.sum(dim=1, keepdim=True)
        return {"image": cross_entropy(logits, same) / 2, "text": cross_entropy(logits.T, same) / 2}

    optimize_backdoor(
        backdoored,
        loss,
        len(images),
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        bf16=bf16,
        seed=seed,
        disable_tqdm=disable_tqdm,
        desc="Implanting poisoned pairs",
    )
    return check_implant(
        clean,
        backdoored,
        trigger,
        check_inputs,
        target_reference=target_reference,
        min_asr=min_asr,
        max_accuracy_loss=max_accuracy_loss,
        disable_tqdm=disable_tqdm,
    )
