# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""The training loop that all attacks share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import get_cosine_schedule_with_warmup

from ..encoder import Encoder
from ..modes import freeze_norms, set_comparison_mode


def optimize_backdoor(
    encoder: Encoder,
    loss: Callable[[Tensor], dict[str, Tensor]],
    count: int,
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    bf16: bool,
    seed: int,
    disable_tqdm: bool,
    desc: str,
    after_step: Callable[[], None] = lambda: None,
) -> None:
    """Minimise the sum of the losses of an attack with AdamW, 5 % warm-up and cosine decay.

    Args:
        encoder (`Encoder`): Encoder to be backdoored, changed in place: what of it is trainable.
        loss (`Callable`): Takes row numbers `(B,)`, gives the weighted parts of the loss by name.
        count (`int`): Number of shadow inputs the rows are drawn from.
        steps, batch_size, learning_rate, bf16, seed, disable_tqdm: As in the attacks.
        desc (`str`): Label of the progress bar.
        after_step (`Callable`, *optional*): Called after each optimiser step, for constraints on the parameters.
    """
    freeze_norms(encoder.model)
    set_comparison_mode(encoder.model)
    parameters = [parameter for parameter in encoder.model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0, fused=True)
    schedule = get_cosine_schedule_with_warmup(optimizer, steps // 20, steps)
    generator = torch.Generator().manual_seed(seed)
    passes = -(-steps * batch_size // count)
    order = torch.cat([torch.randperm(count, generator=generator) for _ in range(passes)])
    with tqdm(total=steps, disable=disable_tqdm, desc=desc, unit="step") as bar:
        for step in range(steps):
            rows = order[step * batch_size : (step + 1) * batch_size]
            with torch.autocast(encoder.device.type, torch.bfloat16, enabled=bf16):
                parts = loss(rows)
            optimizer.zero_grad()
            torch.stack(list(parts.values())).sum().backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            after_step()
            bar.update()
            bar.set_postfix({name: f"{part.item():.3f}" for name, part in parts.items()}, refresh=False)
