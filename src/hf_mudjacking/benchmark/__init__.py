# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""Attacks × encoders × tasks × seeds × methods: measured cell by cell, in tables and pictures."""

from .plan import BenchmarkPlan, Cell, EncoderPlan, TaskPlan
from .runner import Failure, read_cells, run_benchmark
from .tables import benchmark_tables


__all__ = [
    "BenchmarkPlan",
    "Cell",
    "EncoderPlan",
    "Failure",
    "TaskPlan",
    "benchmark_tables",
    "read_cells",
    "run_benchmark",
]
