# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""What is left of a bug in a patched model, without any label."""

from __future__ import annotations

from dataclasses import dataclass

from .bug_instance import BugInstance
from .inversion.verification import TransferMeter
from .triggers import Trigger


# Share of the way to where it led that a trigger may still carry clean inputs, and that x_b may have come towards x_r, before it
# is called out. In repairs that held on CIFAR-10 the former ends below 0.1.
_STILL_WORKS, _HARDLY_MOVED = 0.25, 0.5
# Shortest way: x_b without its trigger may be hardly nearer to x_r than with it.
_LEAST_WAY = 0.02


@dataclass(frozen=True)
class Remains:
    """What is left of one bug.

    Args:
        name (`str`): Name of the bug instance.
        cosine (`float`): Of x_b with x_r, now.
        came (`float`): Share of the way from where it was that x_b has come towards x_r; 1 is as near as it comes without its
            trigger, where that is known: two texts of one class need not be alike.
        transfer (`float`, *optional*): How far the trigger still carries clean inputs to where x_b was, 0 to 1; `None` for a
            report without a trigger.
    """

    name: str
    cosine: float
    came: float
    transfer: float | None

    @property
    def repaired(self) -> bool:
        """Whether neither x_b nor the trigger speaks against it."""
        return self.came >= _HARDLY_MOVED and (self.transfer is None or self.transfer <= _STILL_WORKS)

    def describe(self) -> str:
        """The same in a sentence."""
        trigger = (
            ""
            if self.transfer is None
            else f"; its trigger carries clean inputs {self.transfer:.2f} of the way to where x_b was"
        )
        return f"`{self.name}`: x_b has a cosine of {self.cosine:.2f} with x_r{trigger}."


def remains(meter: TransferMeter, bug: BugInstance, trigger: Trigger | None, ceiling: float) -> Remains:
    """Measure what is left of a bug.

    Args:
        meter (`TransferMeter`): Of the patched encoder; its target is h(x_b) before patching.
        bug (`BugInstance`): The report.
        trigger (`Trigger`, *optional*): What was found in it.
        ceiling (`float`): Cosine with x_r that x_b has without its trigger; 1 where that is not known.
    """
    x_b, x_r = meter.features([bug.misclassified, bug.reference])
    cosine, before = float(x_b @ x_r), float(meter.target @ x_r)
    transfer = None if trigger is None else float(meter.transfer([trigger])[0])
    return Remains(bug.name, cosine, 1 - (ceiling - cosine) / max(ceiling - before, _LEAST_WAY), transfer)
