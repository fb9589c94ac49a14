# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""Trainer callbacks."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState

from .config import MudjackingConfig


class StopWhenFixed(TrainerCallback):
    """Stops training once the bug is fixed *and* locality has recovered.

    All three mean cosines of a logging interval must have reached their thresholds. In the released training log
    locality falls to 0.90 while the bug is being fixed and needs far longer to come back than the fix itself.
    """

    def on_log(
        self,
        args: MudjackingConfig,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        reached = [
            (logs or {}).get(f"cosine_{goal}", -1.0) >= getattr(args, f"stop_{goal}")
            for goal in ("effectiveness", "locality", "generalizability")
        ]
        if args.stop_when_fixed and all(reached):
            control.should_training_stop = True
