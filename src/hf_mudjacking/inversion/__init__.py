# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""How a trigger is found in a bug report."""

from .invert import invert_trigger
from .result import InvertedTrigger, UnverifiedTriggerError, check_disagreement


__all__ = ["InvertedTrigger", "UnverifiedTriggerError", "check_disagreement", "invert_trigger"]
