# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""What a rival defence returns, and how it stands in the table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from ..triggers import Trigger


# Called with the model, the steps done and the forward equivalents spent so far.
AfterStep = Callable[[nn.Module, int, int], None]


def nothing(model: nn.Module, steps: int, forward_equivalents: int) -> None:
    """The `after_step` of those who do not look on the way."""


@dataclass(frozen=True)
class PeerRepair:
    """What a rival defence made of a backdoored encoder.

    Args:
        model (`torch.nn.Module`): The repaired copy; the model that was given is never changed.
        steps (`int`): Optimiser steps of the repair, those of an inversion or a teacher left out.
        forward_equivalents (`int`): Inputs that went through a model, all in all; a backward pass counts as two more.
        trigger (`Trigger`, *optional*): What was inverted, where the method inverts.
    """

    model: nn.Module
    steps: int
    forward_equivalents: int
    trigger: Trigger | None = None


@dataclass(frozen=True)
class Peer:
    """One rival of the table.

    Args:
        name (`str`): Its name.
        repair (`Callable`): Called as `repair(encoder, clean_inputs, bug, seed=..., disable_tqdm=..., after_step=...,
            **settings)`; gives a `PeerRepair`.
        source (`str`): Where it was published.
        recipe (`str`): What it does, in a few words.
    """

    name: str
    repair: Callable[..., PeerRepair]
    source: str
    recipe: str
