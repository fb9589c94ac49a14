# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""Drawing on the CPU with a seed of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Within it, what is drawn on the CPU is drawn with this seed; afterwards its generator goes on as if nothing had been.

    A GPU's generator is left alone: `torch.manual_seed` would seed it too, for good.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield
