# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""Keeps out of a model's configuration what transformers' Trainer writes there: a patch changes weights alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedConfig, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class _WhenTrainingBegins(TrainerCallback):
    """Does what must be done when training is set up and no step was made yet."""

    def __init__(self, action: Callable[[], None]) -> None:
        self.action = action

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.action()


@contextmanager
def own_special_tokens(trainer: Trainer) -> Iterator[None]:
    """Within it, training leaves the special tokens of the model's configuration as they are.

    The base class would write the tokenizer's there when training begins, even of a tower that is not patched, and some
    models read texts by them: CLIP pools at `eos_token_id`. So it finds no tokenizer until then.
    """
    given, trainer.processing_class = trainer.processing_class, None
    begun = _WhenTrainingBegins(lambda: setattr(trainer, "processing_class", given))
    trainer.add_callback(begun)
    try:
        yield
    finally:
        trainer.remove_callback(begun)
        trainer.processing_class = given


@contextmanager
def own_use_cache(config: PreTrainedConfig, own: bool | None) -> Iterator[None]:
    """Within it, a configuration says of `use_cache` what it said before it was trained with; `None` is nothing."""
    trained_with = config.use_cache
    if own is None:
        del config.use_cache
    else:
        config.use_cache = own
    try:
        yield
    finally:
        config.use_cache = trained_with
