# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""`invert_trigger`: from a bug report to a verified trigger."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from torch import nn

from ..bug_instance import BugInstance
from ..encoder import Encoder, FeatureSource
from ..preprocessing import RawInput
from .image import invert_image_trigger
from .result import InvertedTrigger
from .text import invert_text_trigger


# Fewer clean inputs than this verify nothing.
_MIN_INPUTS = 4


def invert_trigger(
    model: str | os.PathLike[str] | nn.Module | Encoder,
    bug: BugInstance,
    validation_inputs: Sequence[RawInput],
    processing_class: Any = None,
    feature_source: FeatureSource = "auto",
    *,
    other_inputs: Sequence[RawInput] | None = None,
    max_area: float = 0.4,
    seed: int = 0,
    disable_tqdm: bool = True,
) -> InvertedTrigger:
    """Find the trigger in a misclassified image or text.

    Parts of x_b that keep it away from x_r, or at h(x_b), are proposed by attribution; each is put into clean inputs, and the smallest
    that carries their features towards h(x_b) is the trigger. [`InvertedTrigger`] holds the evidence.

    Args:
        model (`str`, `os.PathLike`, `torch.nn.Module` or `Encoder`): Backdoored encoder, or its id or folder.
        bug (`BugInstance`): The report.
        validation_inputs (`Sequence[PIL.Image.Image]` or `Sequence[str]`): Clean, unlabelled inputs; 16 to 64 are enough.
        processing_class (`BaseImageProcessor` or `PreTrainedTokenizerBase`, *optional*): Loaded from the model's id when
            absent.
        feature_source (`str`, *optional*, defaults to `"auto"`): See [`~hf_mudjacking.encoder.resolve_feature_source`].
        other_inputs (`Sequence[PIL.Image.Image]`, *optional*): Further clean images, better 1,000: they show what pictures look
            like and are what triggers over the whole picture are optimised on, so that validation inputs are held out. The
            validation inputs when absent; not needed for texts.
        max_area (`float`, *optional*, defaults to 0.4): Largest share of the picture that the part of a patch that fires
            may cover; a text may consist of its trigger.
        seed (`int`, *optional*, defaults to 0): Seed of the colour sampling in images.
        disable_tqdm (`bool`, *optional*, defaults to `True`): Whether to hide the progress bar.

    Returns:
        `InvertedTrigger`: The trigger with its transfer, control, attribution and cost. Little `evidence` says that no
        localised trigger explains the report.

    Raises:
        TypeError, ValueError: If the report is not of the kind that the model takes.
        ValueError: If there are fewer than 4 validation inputs, x_b and x_r already agree ("nothing to patch"), or
            clean inputs all have the feature of x_b.
    """
    if not isinstance(bug, BugInstance):
        raise TypeError(
            f"`bug` is of type `{type(bug).__name__}`; a `BugInstance(misclassified, reference)` is needed."
        )
    encoder = model
    if not isinstance(model, Encoder):
        encoder = Encoder.load(model, processing_class, feature_source, bug.modality)
    for name, inputs in (("validation_inputs", validation_inputs), ("other_inputs", other_inputs)):
        if inputs is not None and (isinstance(inputs, str) or not isinstance(inputs, Sequence)):
            raise TypeError(
                f"`{name}` is of type `{type(inputs).__name__}`; a list of images or texts is needed. Of a dataset that is "
                f"`list(dataset['{encoder.modality}'])`."
            )
    if bug.modality != encoder.modality:
        raise TypeError(
            f"Bug instance `{bug.name}` is of kind {bug.modality}, but the model takes {encoder.modality}s."
        )
    if len(validation_inputs) < _MIN_INPUTS:
        raise ValueError(
            f"Verification needs at least {_MIN_INPUTS} clean inputs, better 32; got {len(validation_inputs)}."
        )
    if encoder.modality == "image":
        others = validation_inputs if other_inputs is None else other_inputs
        return invert_image_trigger(
            encoder, bug, validation_inputs, others, max_area=max_area, seed=seed, disable_tqdm=disable_tqdm
        )
    return invert_text_trigger(encoder, bug, validation_inputs, disable_tqdm=disable_tqdm)
