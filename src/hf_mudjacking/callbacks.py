# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""Trainer callbacks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_utils import SaveStrategy

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
            # Without these, the step that fixed the bug would be in no checkpoint, and `load_best_model_at_end` would go
            # back to an earlier one.
            control.should_save = args.save_strategy != SaveStrategy.NO
            control.should_evaluate = control.should_evaluate or args.load_best_model_at_end


class BeforeTrackersClose(TrainerCallback):
    """Does what must be logged when training is over; as the first of all callbacks, while trackers still listen.

    Args:
        action (`Callable`): What to do.
    """

    def __init__(self, action: Callable[[], None]) -> None:
        self.action = action

    def on_train_end(
        self, args: MudjackingConfig, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.action()


class CompactProgress(ProgressCallback):
    """A progress bar that carries the cosines itself, instead of printing a dictionary every few steps."""

    def on_log(
        self,
        args: MudjackingConfig,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if state.is_world_process_zero and self.training_bar is not None and "cosine_locality" in (logs or {}):
            self.training_bar.set_postfix(
                {goal: f"{logs[f'cosine_{goal}']:.3f}" for goal in ("effectiveness", "locality", "generalizability")}
            )


def use_compact_progress(trainer: Trainer) -> None:
    """Let a trainer show [`CompactProgress`], or nothing where progress bars are disabled."""
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    if not trainer.args.disable_tqdm:
        trainer.add_callback(CompactProgress)
