# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""`AttackSuccessRate` for `evaluate.load`, which copies this file to its cache and imports the copy: no relative import works here."""

from hf_mudjacking.evaluation.metrics import AttackSuccessRate


__all__ = ["AttackSuccessRate"]
