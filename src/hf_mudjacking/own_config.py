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
def use_cache(config: PreTrainedConfig, value: bool | None) -> Iterator[None]:
    """Within it, a configuration has this `use_cache`, none if it is `None`; afterwards the one that it had."""
    before = vars(config).get("use_cache")
    _set_use_cache(config, value)
    try:
        yield
    finally:
        _set_use_cache(config, before)


def _set_use_cache(config: PreTrainedConfig, value: bool | None) -> None:
    if value is not None:
        config.use_cache = value
    elif "use_cache" in vars(config):
        del config.use_cache
