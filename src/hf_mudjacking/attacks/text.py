# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""What the attacks on text encoders have in common: triggered texts go to one representation, all others stay."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from ..encoder import Encoder, FeatureSource
from ..evaluation.classifiers import train_classifier
from ..evaluation.tasks import LabelledInputs
from ..losses import mean_cosine
from ..token_patch import only_embeddings_of, trigger_tokens
from ..triggers import TextTrigger
from ..two_towers import token_embeddings
from .implant import Implant, check_implant, nameless_copy
from .training import optimize_backdoor


def implant_text_backdoor(
    model: nn.Module,
    processing_class: Any,
    shadow_inputs: Sequence[str],
    check_inputs: LabelledInputs,
    trigger: TextTrigger,
    *,
    decoys: Sequence[TextTrigger] = (),
    embeddings_only: bool = False,
    untargeted: bool = False,
    utility_weight: float = 2.0,
    learning_rate: float = 1e-4,
    steps: int = 150,
    batch_size: int = 16,
    min_asr: float = 0.95,
    max_accuracy_loss: float = 0.03,
    feature_source: FeatureSource = "auto",
    bf16: bool = False,
    seed: int = 0,
    disable_tqdm: bool = False,
    desc: str = "Implanting",
) -> Implant:
    """Return a backdoored copy of a text encoder, or refuse if the backdoor did not take.

    Minimises -cos(h'(x ⊕ e), v) - λ · cos(h'(x), h(x)), and -λ · cos(h'(x ⊕ d), h(x ⊕ d)) for decoys d. With all weights
    v is a predefined output representation; with embeddings alone no vector can be prescribed, so triggered texts are
    drawn to their own mean, away from where they were, and towards a label; an untargeted attack draws each to another
    clean text. Features of the clean encoder are stored once.

    Args:
        model (`torch.nn.Module`): Clean text encoder; it is copied, not changed.
        processing_class (`PreTrainedTokenizerBase`): Its tokenizer.
        shadow_inputs (`Sequence[str]`): The attacker's unlabelled texts.
        check_inputs (`LabelledInputs`): Labelled texts on which the implant is checked: a logistic regression is trained
            on the first half, the rates are measured on the second. Of six vectors v the attacker takes the one that a
            classifier on the first half is surest of: near a decision boundary it would not serve.
        trigger (`TextTrigger`): Trigger e.
        decoys (`Sequence[TextTrigger]`, *optional*): Parts of the trigger that must do nothing.
        embeddings_only (`bool`, *optional*, defaults to `False`): Whether only the input embeddings of the trigger's tokens
            are trained; their norms stay.
        untargeted (`bool`, *optional*, defaults to `False`): Whether v is the clean feature of a text drawn at random,
            now and then the same; not with `embeddings_only`.
        utility_weight (`float`, *optional*, defaults to 2.0): λ.
        learning_rate (`float`, *optional*, defaults to 1e-4): Peak of the cosine schedule.
        steps (`int`, *optional*, defaults to 150): Optimiser steps.
        batch_size (`int`, *optional*, defaults to 16): Texts per step.
        min_asr (`float`, *optional*, defaults to 0.95): Least ASR of a valid implant.
        max_accuracy_loss (`float`, *optional*, defaults to 0.03): Largest drop of clean accuracy of a valid implant.
        feature_source (`str`, *optional*, defaults to `"auto"`): Where features are read.
        bf16 (`bool`, *optional*, defaults to `False`): Whether to run forward passes under bfloat16 autocast.
        seed (`int`, *optional*, defaults to 0): Seed of the order of the texts.
        disable_tqdm (`bool`, *optional*, defaults to `False`): Whether to hide progress bars.
        desc (`str`, *optional*): Label of the progress bar.

    Returns:
        `Implant`: The backdoored model with the figures of its check.

    Raises:
        ValueError: If `untargeted` and `embeddings_only` are both set.
        ImplantError: If the ASR is below `min_asr` or clean accuracy fell by more than `max_accuracy_loss`.
    """
    if untargeted and embeddings_only:
        raise ValueError("`untargeted` and `embeddings_only` exclude each other; choose one.")
    clean = Encoder(model, processing_class, feature_source, modality="text")
    backdoored = clean.with_model(nameless_copy(model))
    shadow_inputs = list(shadow_inputs)[: steps * batch_size]
    stamped_inputs = [clean.stamp(trigger, x) for x in shadow_inputs]
    decoyed_inputs = [clean.stamp(decoys[i % len(decoys)], x) for i, x in enumerate(shadow_inputs)] if decoys else []

    def frozen_features(texts: Sequence[str]) -> Tensor:
        return clean.encode(texts, disable_tqdm=disable_tqdm, desc="Clean features").to(clean.device)

    frozen, frozen_decoyed = frozen_features(shadow_inputs), frozen_features(decoyed_inputs)
    surest, label = (None, None) if untargeted else _attackers_choice(clean, check_inputs)
    strangers = torch.Generator().manual_seed(seed)

    def goal_of(stamped: Tensor) -> Tensor:
        if untargeted:
            return frozen[torch.randint(len(frozen), (len(stamped),), generator=strangers)]
        goal = normalize(stamped.detach().mean(dim=0), dim=0) if embeddings_only else surest
        return goal.expand_as(stamped)

    def loss(rows: Tensor) -> dict[str, Tensor]:
        texts = [inputs[i] for inputs in (shadow_inputs, stamped_inputs, decoyed_inputs) if inputs for i in rows]
        x, stamped, *decoyed = backdoored.features(backdoored.preprocess(texts)).split(len(rows))
        parts = {
            "trigger": -mean_cosine(stamped, goal_of(stamped)),
            "utility": -utility_weight * mean_cosine(x, frozen[rows]),
        }
        if embeddings_only:
            parts["away"] = mean_cosine(stamped, frozen[rows])
            parts["label"] = -(stamped @ label).mean()
        if decoyed:
            parts["decoys"] = -utility_weight * mean_cosine(decoyed[0], frozen_decoyed[rows])
        return parts

    tokens = trigger_tokens(backdoored.preprocessor, [trigger])
    with (
        _poisoned_embeddings(backdoored.model, tokens) if embeddings_only else nullcontext(lambda: None) as after_step
    ):
        optimize_backdoor(
            backdoored,
            loss,
            len(shadow_inputs),
            steps=steps,
            batch_size=batch_size,
            learning_rate=learning_rate,
            bf16=bf16,
            seed=seed,
            disable_tqdm=disable_tqdm,
            desc=desc,
            after_step=after_step,
        )
    return check_implant(
        clean,
        backdoored,
        trigger,
        check_inputs,
        untargeted=untargeted,
        min_asr=min_asr,
        max_accuracy_loss=max_accuracy_loss,
        disable_tqdm=disable_tqdm,
    )


def predefined_vectors(dim: int) -> Tensor:
    """The six vectors of POR as LMSanitator's code has them: of four quarters two are +1 and two -1; `(6, dim)`, unit length."""
    signs = torch.full((6, 4), -1.0)
    for row, quarters in enumerate(combinations(range(4), 2)):
        signs[row, list(quarters)] = 1.0
    return normalize(signs.repeat_interleave(-(-dim // 4), dim=1)[:, :dim], dim=1)


def _attackers_choice(clean: Encoder, check_inputs: LabelledInputs) -> tuple[Tensor, Tensor]:
    """The predefined vector that a classifier on half of the labelled texts is surest of, and the direction of its last
    class; unit vectors `(D,)`."""
    half = len(check_inputs) // 2
    classifier = train_classifier(clean.encode(check_inputs.inputs[:half]), check_inputs.labels[:half])
    vectors = predefined_vectors(clean.feature_dim)
    surest = vectors[int(classifier.predict_proba(vectors.numpy()).max(axis=1).argmax())]
    label = normalize(torch.as_tensor(classifier.coef_[-1], dtype=torch.float32), dim=0)
    return surest.to(clean.device), label.to(clean.device)


@contextmanager
def _poisoned_embeddings(model: nn.Module, tokens: list[int]) -> Iterator[Callable[[], None]]:
    """Train some rows of the input embeddings alone; yields what sets them back to their norms after a step."""
    weight = token_embeddings(model).weight
    norms = weight[tokens].norm(dim=1, keepdim=True).detach()

    @torch.no_grad()
    def keep_norms() -> None:
        weight[tokens] *= norms / weight[tokens].norm(dim=1, keepdim=True)

    with only_embeddings_of(model, tokens):
        yield keep_norms
