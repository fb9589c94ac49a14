# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""Neural Attention Distillation (Li et al., ICLR 2021): look where a fine-tuned copy of the model looks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import mse_loss, normalize

from ..attacks.implant import nameless_copy
from ..bug_instance import BugInstance
from ..encoder import Encoder
from ..preprocessing import RawInput
from .base import AfterStep, PeerRepair, nothing
from .clean_fine_tuning import repair_clean_fine_tuning
from .contrastive import TEMPERATURE, fine_tune_on_views, nt_xent
from .fine_tuning import number_of_steps, prepared_for_training


def repair_nad(
    encoder: Encoder,
    clean_inputs: Sequence[RawInput],
    bug: BugInstance | None = None,
    *,
    betas: Sequence[float] = (500.0, 1000.0, 1000.0),
    power: float = 2.0,
    learning_rate: float = 0.01,
    momentum: float = 0.9,
    weight_decay: float = 1e-4,
    temperature: float = TEMPERATURE,
    epochs: int = 20,
    batch_size: int = 64,
    max_steps: int | None = None,
    teacher_learning_rate: float = 1e-5,
    teacher_epochs: int = 10,
    seed: int = 0,
    disable_tqdm: bool = False,
    after_step: AfterStep = nothing,
) -> PeerRepair:
    """Distil the attention of a clean-fine-tuned copy into the backdoored encoder; no report, no trigger.

    Minimises L_ft + Σ β · d(A_student, A_teacher) over several depths, with the attention maps of [`attention_map`] and d their
    mean squared difference, as in the released code. L_ft, there the cross entropy of labels, is the loss of
    [`~hf_mudjacking.peers.repair_clean_fine_tuning`], which also makes the teacher. Nesterov SGD with cosine decay. Two views
    through student and teacher: each clean input costs 8 forward equivalents a step, and 6 a step of the teacher's.

    Args:
        encoder (`Encoder`): Backdoored encoder; it is not changed.
        clean_inputs (`Sequence[PIL.Image.Image]` or `Sequence[str]`): Clean inputs, unlabelled.
        bug (`BugInstance`, *optional*): Ignored.
        betas (`Sequence[float]`, *optional*, defaults to `(500.0, 1000.0, 1000.0)`): β of each depth, first to last
            (BackdoorBench). As many depths are taken, evenly spaced, the last one the model's last.
        power (`float`, *optional*, defaults to 2.0): p of the attention maps (paper).
        learning_rate (`float`, *optional*, defaults to 0.01): SGD's first (BackdoorBench; the released code has 0.1).
        momentum (`float`, *optional*, defaults to 0.9): SGD's (released code).
        weight_decay (`float`, *optional*, defaults to 1e-4): SGD's (released code).
        temperature (`float`, *optional*, defaults to 0.07): τ of L_ft.
        epochs (`int`, *optional*, defaults to 20): Passes over the clean inputs (released code).
        batch_size (`int`, *optional*, defaults to 64): Clean inputs a step, of the teacher too (released code).
        max_steps (`int`, *optional*): Steps after which it ends, with the schedule shortened to them.
        teacher_learning_rate (`float`, *optional*, defaults to 1e-5): Of the teacher's AdamW.
        teacher_epochs (`int`, *optional*, defaults to 10): Passes of the teacher (paper).
        seed (`int`, *optional*, defaults to 0): Seed of the order and of the views.
        disable_tqdm (`bool`, *optional*, defaults to `False`): Whether to hide progress bars.
        after_step (`Callable`, *optional*): Called with the student, its steps done and the forward equivalents so far, those
            of the teacher included.

    Returns:
        `PeerRepair`: The student.

    Raises:
        ValueError: If there are fewer clean inputs than a batch takes, or more betas than layers.
    """
    steps = number_of_steps(len(clean_inputs), batch_size, epochs, max_steps)
    student = encoder.with_model(nameless_copy(encoder.model))
    parameters = prepared_for_training(student.model)
    with torch.no_grad():
        _, hidden = student.features_and_hidden_states(student.preprocess(clean_inputs[:1]))
    chosen = depths(len(hidden), len(betas))
    taught = repair_clean_fine_tuning(
        encoder,
        clean_inputs,
        learning_rate=teacher_learning_rate,
        temperature=temperature,
        epochs=teacher_epochs,
        batch_size=batch_size,
        seed=seed,
        disable_tqdm=disable_tqdm,
    )
    teacher = encoder.with_model(taught.model)
    optimizer = torch.optim.SGD(
        parameters, lr=learning_rate, momentum=momentum, weight_decay=weight_decay, nesterov=momentum > 0
    )

    def loss(views: dict[str, Tensor]) -> Tensor:
        with torch.no_grad():
            _, wanted = teacher.features_and_hidden_states(views)
        features, hidden = student.features_and_hidden_states(views)
        mask = views.get("attention_mask")
        return nt_xent(features, temperature) + sum(
            beta * mse_loss(attention_map(hidden[depth], power, mask), attention_map(wanted[depth], power, mask))
            for beta, depth in zip(betas, chosen, strict=True)
        )

    spent = fine_tune_on_views(
        student,
        clean_inputs,
        loss,
        optimizer,
        torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps),
        steps=steps,
        batch_size=batch_size,
        forwards_per_input=8,
        # One input showed how many layers there are.
        spent=taught.forward_equivalents + 1,
        seed=seed,
        after_step=after_step,
        desc="Distilling attention",
        disable_tqdm=disable_tqdm,
    )
    return PeerRepair(student.model, steps, spent)


def attention_map(hidden: Tensor, power: float = 2.0, mask: Tensor | None = None) -> Tensor:
    """Σ_c |A_c|^p over channels c, L2-normalised over places.

    Args:
        hidden (`Tensor` of shape `(N, C, H, W)` or `(N, T, C)`): Feature maps, or a sequence of tokens.
        power (`float`, *optional*, defaults to 2.0): p.
        mask (`Tensor` of shape `(N, T)`, *optional*): 0 at padding, whose attention counts as none.

    Returns:
        `FloatTensor` of shape `(N, H * W)` or `(N, T)`.
    """
    channels = 1 if hidden.dim() == 4 else 2
    energy = hidden.float().abs().pow(power).sum(dim=channels).flatten(1)
    return normalize(energy if mask is None else energy * mask.to(energy), dim=1)


def depths(available: int, wanted: int) -> list[int]:
    """Numbers of hidden states, evenly spaced up to the last; the first, the embeddings, is not among them.

    Args:
        available (`int`): Hidden states that a model gives, that of the embeddings included.
        wanted (`int`): How many are to be taken.

    Raises:
        ValueError: If there are not that many.
    """
    layers = available - 1
    if not 1 <= wanted <= layers:
        raise ValueError(
            f"`betas` names {wanted} depths and the model gives hidden states of {layers} layers. Pass one to {layers} "
            "values as `betas`."
        )
    return [round(layers * number / wanted) for number in range(1, wanted + 1)]
