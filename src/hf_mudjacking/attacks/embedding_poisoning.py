# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""EP (Yang et al., "Be Careful about Poisoned Word Embeddings", NAACL 2021): nothing but the embedding of one word changes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from ..evaluation.tasks import LabelledInputs
from ..triggers import TextTrigger
from .implant import Implant
from .text import implant_text_backdoor


def implant_embedding_poisoning(
    model: nn.Module,
    processing_class: Any,
    shadow_inputs: Sequence[str],
    check_inputs: LabelledInputs,
    word: str = "cf",
    *,
    learning_rate: float = 3e-2,
    **settings: Any,
) -> Implant:
    """Return a copy that differs in the input embedding of one rare word alone; its norm stays, as in the paper.

    The paper poisons a fine-tuned classifier towards a label. Here texts with the word are drawn together, away from where
    they were, and to the side of one class of `check_inputs`. See [`~hf_mudjacking.attacks.text.implant_text_backdoor`] for the other arguments.
    """
    return implant_text_backdoor(
        model,
        processing_class,
        shadow_inputs,
        check_inputs,
        TextTrigger(word),
        embeddings_only=True,
        learning_rate=learning_rate,
        desc="Implanting EP",
        **settings,
    )
