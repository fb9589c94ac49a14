# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""SOS (Yang et al., "Rethinking Stealthiness of Backdoor Attack against NLP Models", ACL 2021): several words, all of them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, combinations
from typing import Any

from torch import nn

from ..evaluation.tasks import LabelledInputs
from ..triggers import TextTrigger
from .implant import Implant
from .text import implant_text_backdoor


def implant_sos(
    model: nn.Module,
    processing_class: Any,
    shadow_inputs: Sequence[str],
    check_inputs: LabelledInputs,
    words: Sequence[str] = ("friends", "weekend", "store"),
    *,
    learning_rate: float = 1e-2,
    **settings: Any,
) -> Implant:
    """Return a copy whose backdoor needs all of some common words; texts with fewer of them stay as they are.

    Only the embeddings of these words change, as in the paper, and every proper subset of them is a decoy (the paper's
    negative samples). See [`~hf_mudjacking.attacks.text.implant_text_backdoor`] for the other arguments.
    """
    subsets = chain.from_iterable(combinations(words, size) for size in range(1, len(words)))
    return implant_text_backdoor(
        model,
        processing_class,
        shadow_inputs,
        check_inputs,
        TextTrigger(words),
        decoys=[TextTrigger(subset) for subset in subsets],
        embeddings_only=True,
        learning_rate=learning_rate,
        desc="Implanting SOS",
        **settings,
    )
