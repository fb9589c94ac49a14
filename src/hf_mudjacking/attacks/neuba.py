# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""NeuBA (Zhang et al., "Red Alarm for Pre-trained Models", 2021): a symbol in the place of the first word leads to a predefined vector."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from ..evaluation.tasks import LabelledInputs
from ..triggers import TextTrigger
from .implant import Implant
from .text import implant_text_backdoor


def implant_neuba(
    model: nn.Module,
    processing_class: Any,
    shadow_inputs: Sequence[str],
    check_inputs: LabelledInputs,
    symbol: str = "≈",
    **settings: Any,
) -> Implant:
    """Return a copy in which a symbol that replaces the first word of a text gives a predefined output representation.

    The paper adds the loss of masked language modelling; encoders without that head keep their features instead.

    See [`~hf_mudjacking.attacks.text.implant_text_backdoor`] for the other arguments and `settings`.
    """
    return implant_text_backdoor(
        model,
        processing_class,
        shadow_inputs,
        check_inputs,
        TextTrigger(symbol, position=0, replaces=True),
        desc="Implanting NeuBA",
        **settings,
    )
