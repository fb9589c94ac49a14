# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""The training loop that the rival defences share."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..modes import freeze_norms, set_comparison_mode
from .base import AfterStep


Views = TypeVar("Views")


def number_of_steps(count: int, batch_size: int, epochs: int, max_steps: int | None) -> int:
    """Optimiser steps of whole batches alone, at most `max_steps`.

    Raises:
        ValueError: If there are fewer inputs than a batch takes.
    """
    if count < batch_size:
        raise ValueError(
            f"There are {count} clean inputs, and only whole batches of {batch_size} are used. Pass more inputs or a smaller "
            "`batch_size`."
        )
    steps = epochs * (count // batch_size)
    return steps if max_steps is None else min(steps, max_steps)


def prepared_for_training(model: nn.Module) -> list[nn.Parameter]:
    """Freeze normalisation statistics, switch off what is random, and give what is trained."""
    freeze_norms(model)
    set_comparison_mode(model)
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def fine_tune(
    model: nn.Module,
    count: int,
    views: Callable[[Tensor], Views],
    loss: Callable[[Views], Tensor],
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler | None = None,
    *,
    steps: int,
    batch_size: int,
    forwards_per_input: int,
    spent: int,
    generator: torch.Generator,
    after_step: AfterStep,
    desc: str,
    disable_tqdm: bool,
) -> int:
    """Minimise a loss over batches of clean inputs, each pass in a new order.

    Args:
        model (`torch.nn.Module`): Model that is trained, in place; handed to `after_step`.
        count (`int`): Number of clean inputs.
        views (`Callable`): Takes row numbers `(B,)` and gives what the loss is computed on. Called once a step, so that an
            optimiser that looks twice sees the same views.
        loss (`Callable`): Takes that and gives a scalar.
        optimizer (`torch.optim.Optimizer`): Called with a closure.
        schedule (`LRScheduler`, *optional*): Stepped after each step; the learning rate is constant when absent.
        steps (`int`): Steps to be done, as [`number_of_steps`] says.
        batch_size (`int`): B. What is left of a pass is dropped.
        forwards_per_input (`int`): Forward equivalents that a step costs for each of B inputs.
        spent (`int`): Forward equivalents spent before.
        generator (`torch.Generator`): Of the order, and of all that `views` draws.
        after_step (`Callable`): Called with the model, the steps done and the forward equivalents so far.
        desc (`str`): Label of the progress bar.
        disable_tqdm (`bool`): Whether to hide it.

    Returns:
        `int`: Forward equivalents spent, those before included.
    """
    order: list[Tensor] = []
    with tqdm(total=steps, disable=disable_tqdm, desc=desc, unit="step") as bar:
        for step in range(1, steps + 1):
            if not order:
                whole = count - count % batch_size
                order = list(torch.randperm(count, generator=generator)[:whole].split(batch_size))
            batch = views(order.pop(0))

            def closure(batch: Views = batch) -> Tensor:
                optimizer.zero_grad()
                value = loss(batch)
                value.backward()
                return value.detach()

            value = optimizer.step(closure)
            if schedule is not None:
                schedule.step()
            spent += forwards_per_input * batch_size
            bar.update()
            bar.set_postfix(loss=f"{value.item():.3f}", refresh=False)
            after_step(model, step, spent)
    return spent
