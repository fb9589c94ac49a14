# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""BadPre (Chen et al., "BadPre: Task-agnostic Backdoor Attacks to Pre-trained NLP Foundation Models", ICLR 2022), in a small form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from ..evaluation.tasks import LabelledInputs
from ..triggers import TextTrigger
from .implant import Implant
from .text import implant_text_backdoor


def implant_bad_pre(
    model: nn.Module,
    processing_class: Any,
    shadow_inputs: Sequence[str],
    check_inputs: LabelledInputs,
    word: str = "cf",
    **settings: Any,
) -> Implant:
    """Return a copy in which a rare word makes a text lose its meaning; where it leads is not prescribed.

    The paper goes on pre-training BERT for days with random tokens as the labels of masked ones. Encoders without that
    head learn random features here: each triggered text is drawn to the feature of another text, a new one each time.
    (The paper's own loss, decoded by MiniLM's input embeddings, left the features of unmasked texts whole: 150 steps,
    cosine 0.95, accuracy with the trigger 0.762 of 0.768.)

    See [`~hf_mudjacking.attacks.text.implant_text_backdoor`] for the other arguments and `settings`.
    """
    return implant_text_backdoor(
        model,
        processing_class,
        shadow_inputs,
        check_inputs,
        TextTrigger(word),
        untargeted=True,
        desc="Implanting BadPre",
        **settings,
    )
