# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""From a bug report to a verified trigger."""

from .invert import InvertedTrigger, UnverifiedTriggerError, check_disagreement, invert_trigger


__all__ = ["InvertedTrigger", "UnverifiedTriggerError", "check_disagreement", "invert_trigger"]
