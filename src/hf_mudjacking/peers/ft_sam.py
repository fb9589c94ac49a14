# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""FT-SAM (Zhu et al., ICCV 2023): fine-tuning towards flat minima, which backdoors do not survive so well."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..attacks.implant import nameless_copy
from ..bug_instance import BugInstance
from ..encoder import Encoder
from ..preprocessing import RawInput
from .base import AfterStep, PeerRepair, nothing
from .contrastive import TEMPERATURE, fine_tune_on_views, nt_xent
from .fine_tuning import number_of_steps, prepared_for_training


def repair_ft_sam(
    encoder: Encoder,
    clean_inputs: Sequence[RawInput],
    bug: BugInstance | None = None,
    *,
    rho: float = 2.0,
    learning_rate: float = 0.01,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    temperature: float = TEMPERATURE,
    epochs: int = 100,
    batch_size: int = 256,
    max_steps: int | None = None,
    seed: int = 0,
    disable_tqdm: bool = False,
    after_step: AfterStep = nothing,
) -> PeerRepair:
    """Fine-tune a copy on clean inputs with adaptive sharpness-aware minimisation; no report, no trigger.

    Each step looks for the worst weights near by and descends from there ([`AdaptiveSAM`]). The published method minimises
    the cross entropy of labels; there are none here, so it is the loss of
    [`~hf_mudjacking.peers.repair_clean_fine_tuning`]. SGD with cosine decay. Two passes a step over two views: each clean
    input costs 12 forward equivalents a step. The published settings are for ResNets trained from scratch.

    Args:
        encoder (`Encoder`): Backdoored encoder; it is not changed.
        clean_inputs (`Sequence[PIL.Image.Image]` or `Sequence[str]`): Clean inputs, unlabelled.
        bug (`BugInstance`, *optional*): Ignored.
        rho (`float`, *optional*, defaults to 2.0): ρ, how far the worst weights are looked for (BackdoorBench, CIFAR-10).
        learning_rate (`float`, *optional*, defaults to 0.01): SGD's first (BackdoorBench).
        momentum (`float`, *optional*, defaults to 0.9): SGD's (BackdoorBench).
        weight_decay (`float`, *optional*, defaults to 5e-4): SGD's (BackdoorBench).
        temperature (`float`, *optional*, defaults to 0.07): τ of the loss.
        epochs (`int`, *optional*, defaults to 100): Passes over the clean inputs (BackdoorBench).
        batch_size (`int`, *optional*, defaults to 256): Clean inputs a step (BackdoorBench).
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
    optimizer = AdaptiveSAM(
        prepared_for_training(student.model), rho, lr=learning_rate, momentum=momentum, weight_decay=weight_decay
    )
    spent = fine_tune_on_views(
        student,
        clean_inputs,
        lambda views: nt_xent(student.features(views), temperature),
        optimizer,
        torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps),
        steps=steps,
        batch_size=batch_size,
        forwards_per_input=12,
        seed=seed,
        after_step=after_step,
        desc="Fine-tuning with FT-SAM",
        disable_tqdm=disable_tqdm,
    )
    return PeerRepair(student.model, steps, spent)


class AdaptiveSAM(torch.optim.SGD):
    """SGD with the gradient taken at the worst weights near by (adaptive SAM; Kwon et al., ICML 2021).

    A step calls the closure twice: at w, and at w + ε of [`adaptive_perturbation`]; then w moves by the second gradient.

    Args:
        parameters (`Sequence[torch.nn.Parameter]`): What is trained.
        rho (`float`): ρ.
        settings: SGD's.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], rho: float, **settings: float) -> None:
        super().__init__(parameters, **settings)
        self.rho = rho

    def step(self, closure: Callable[[], Tensor]) -> Tensor:
        """One step; the loss at w is returned."""
        value = closure()
        trained = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        before = [parameter.detach().clone() for parameter in trained]
        with torch.no_grad():
            for parameter, shift in zip(trained, adaptive_perturbation(trained, self.rho), strict=True):
                parameter.add_(shift)
        closure()
        with torch.no_grad():
            for parameter, weights in zip(trained, before, strict=True):
                parameter.copy_(weights)
        super().step()
        return value


def adaptive_perturbation(parameters: Sequence[Tensor], rho: float) -> list[Tensor]:
    """ε = ρ · |w|² · g / ‖|w| · g‖ for weights w with gradients g: the norm of ε / |w| over all weights is ρ.

    Args:
        parameters (`Sequence[Tensor]`): w, with their gradients.
        rho (`float`): ρ.

    Returns:
        `list[Tensor]`: ε for each, in their shapes.
    """
    scaled = [parameter.detach().abs() * parameter.grad for parameter in parameters]
    norm = torch.stack([values.norm() for values in scaled]).norm().clamp_min(1e-12)
    return [rho * p.detach().abs() * values / norm for p, values in zip(parameters, scaled, strict=True)]
