# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""Fine-tuning on clean inputs alone, in the manner of CleanCLIP (Bansal et al., ICCV 2023)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import get_cosine_schedule_with_warmup

from ..attacks.implant import nameless_copy
from ..bug_instance import BugInstance
from ..encoder import Encoder
from ..preprocessing import RawInput
from .base import AfterStep, PeerRepair, nothing
from .contrastive import TEMPERATURE, fine_tune_on_views, nt_xent
from .fine_tuning import number_of_steps, prepared_for_training


def repair_clean_fine_tuning(
    encoder: Encoder,
    clean_inputs: Sequence[RawInput],
    bug: BugInstance | None = None,
    *,
    learning_rate: float = 1e-5,
    weight_decay: float = 0.1,
    warmup_steps: int = 50,
    temperature: float = TEMPERATURE,
    epochs: int = 10,
    batch_size: int = 64,
    max_steps: int | None = None,
    seed: int = 0,
    disable_tqdm: bool = False,
    after_step: AfterStep = nothing,
) -> PeerRepair:
    """Fine-tune a copy with the self-supervised term of CleanCLIP; no report, no trigger.

    CleanCLIP adds to CLIP's loss a contrastive loss within each modality. Of one tower only that of its own inputs is left:
    here NT-Xent of two augmented views ([`nt_xent`]), where its code contrasts the picture with one view, in one direction.
    Views of texts have words exchanged or left out ([`edited`]).
    AdamW with a linear warm-up and cosine decay. Each clean input costs 6 forward equivalents a step.

    Args:
        encoder (`Encoder`): Backdoored encoder; it is not changed.
        clean_inputs (`Sequence[PIL.Image.Image]` or `Sequence[str]`): Clean inputs, unlabelled.
        bug (`BugInstance`, *optional*): Ignored.
        learning_rate (`float`, *optional*, defaults to 1e-5): AdamW's peak (CleanCLIP's README).
        weight_decay (`float`, *optional*, defaults to 0.1): Of matrices and filters (CleanCLIP's code).
        warmup_steps (`int`, *optional*, defaults to 50): Steps until the peak (CleanCLIP's README); at most a tenth of all.
        temperature (`float`, *optional*, defaults to 0.07): τ of the loss; CLIP's initial one.
        epochs (`int`, *optional*, defaults to 10): Passes over the clean inputs (CleanCLIP's README).
        batch_size (`int`, *optional*, defaults to 64): Clean inputs a step (CleanCLIP's README).
        max_steps (`int`, *optional*): Steps after which it ends, with the schedule shortened to them.
        seed (`int`, *optional*, defaults to 0): Seed of the order and of the views.
        disable_tqdm (`bool`, *optional*, defaults to `False`): Whether to hide the progress bar.
        after_step (`Callable`, *optional*): Called with the model, the steps done and the forward equivalents so far.

    Returns:
        `PeerRepair`: The fine-tuned copy.

    Raises:
        ValueError: If there are fewer clean inputs than a batch takes.
    """
    steps = number_of_steps(len(clean_inputs), batch_size, epochs, max_steps)
    student = encoder.with_model(nameless_copy(encoder.model))
    parameters = prepared_for_training(student.model)
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.dim() > 1]},
            {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
        ],
        lr=learning_rate,
        weight_decay=weight_decay,
    )
    spent = fine_tune_on_views(
        student,
        clean_inputs,
        lambda views: nt_xent(student.features(views), temperature),
        optimizer,
        get_cosine_schedule_with_warmup(optimizer, min(warmup_steps, steps // 10), steps),
        steps=steps,
        batch_size=batch_size,
        forwards_per_input=6,
        seed=seed,
        after_step=after_step,
        desc="Fine-tuning on clean inputs",
        disable_tqdm=disable_tqdm,
    )
    return PeerRepair(student.model, steps, spent)
