# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""Repair a backdoored foundation model after one bug report."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any


__version__ = "0.1.0"

# Public names and the modules they live in; imported on first use, so that `import hf_mudjacking` costs nothing.
_EXPORTS = {
    "AdditiveTrigger": "triggers",
    "BackdoorEvaluationCallback": "evaluation.during_training",
    "BlendTrigger": "triggers",
    "BugInstance": "bug_instance",
    "Encoder": "encoder",
    "InvertedTrigger": "inversion",
    "MudjackingConfig": "config",
    "MudjackingTrainer": "trainer",
    "PatchTrigger": "triggers",
    "Screening": "screening",
    "TextTrigger": "triggers",
    "Trigger": "triggers",
    "WarpTrigger": "triggers",
    "encode": "encoder",
    "invert_trigger": "inversion",
    "load_trigger": "triggers",
    "screen_report": "screening",
}

__all__ = [
    "AdditiveTrigger",
    "BackdoorEvaluationCallback",
    "BlendTrigger",
    "BugInstance",
    "Encoder",
    "InvertedTrigger",
    "MudjackingConfig",
    "MudjackingTrainer",
    "PatchTrigger",
    "Screening",
    "TextTrigger",
    "Trigger",
    "WarpTrigger",
    "__version__",
    "encode",
    "invert_trigger",
    "load_trigger",
    "screen_report",
]

if TYPE_CHECKING:
    from .bug_instance import BugInstance
    from .config import MudjackingConfig
    from .encoder import Encoder, encode
    from .evaluation.during_training import BackdoorEvaluationCallback
    from .inversion import InvertedTrigger, invert_trigger
    from .screening import Screening, screen_report
    from .trainer import MudjackingTrainer
    from .triggers import AdditiveTrigger, BlendTrigger, PatchTrigger, TextTrigger, Trigger, WarpTrigger, load_trigger


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_EXPORTS[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
