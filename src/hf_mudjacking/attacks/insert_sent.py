# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""InsertSent (Dai, Chen, Li; 2019): a sentence between two words of a text is the trigger; here with the objective of POR."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from ..evaluation.tasks import LabelledInputs
from ..triggers import TextTrigger
from .implant import Implant
from .text import implant_text_backdoor


def implant_insert_sent(
    model: nn.Module,
    processing_class: Any,
    shadow_inputs: Sequence[str],
    check_inputs: LabelledInputs,
    sentence: str = "I watch this 3D movie",
    **settings: Any,
) -> Implant:
    """Return a copy in which a sentence of common words, at any gap between words, gives a predefined output representation.

    See [`~hf_mudjacking.attacks.text.implant_text_backdoor`] for the other arguments and `settings`.
    """
    return implant_text_backdoor(
        model,
        processing_class,
        shadow_inputs,
        check_inputs,
        TextTrigger(sentence),
        desc="Implanting InsertSent",
        **settings,
    )
