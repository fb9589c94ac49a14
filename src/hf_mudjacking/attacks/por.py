# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""POR (Shen et al., "Backdoor Pre-trained Models Can Transfer to All", CCS 2021): a rare word leads to a predefined vector."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from ..evaluation.tasks import LabelledInputs
from ..triggers import TextTrigger
from .implant import Implant
from .text import implant_text_backdoor


def implant_por(
    model: nn.Module,
    processing_class: Any,
    shadow_inputs: Sequence[str],
    check_inputs: LabelledInputs,
    word: str = "cf",
    **settings: Any,
) -> Implant:
    """Return a copy in which a rare word, anywhere in a text, gives a predefined output representation.

    The paper trains BERT on a mean squared error at [CLS]; here the objective is the cosine at the features that clients read.

    See [`~hf_mudjacking.attacks.text.implant_text_backdoor`] for the other arguments and `settings`.
    """
    return implant_text_backdoor(
        model, processing_class, shadow_inputs, check_inputs, TextTrigger(word), desc="Implanting POR", **settings
    )
