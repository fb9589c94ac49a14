# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""Attacks × encoders × tasks × seeds × methods: measured cell by cell, in tables and pictures."""

from .case import Case, kept_cases
from .plan import BenchmarkPlan, Cell, EncoderPlan, TaskPlan
from .runner import Failure, read_cells, run_benchmark
from .tables import benchmark_tables


__all__ = [
    "BenchmarkPlan",
    "Case",
    "Cell",
    "EncoderPlan",
    "Failure",
    "TaskPlan",
    "benchmark_tables",
    "kept_cases",
    "read_cells",
    "run_benchmark",
]
