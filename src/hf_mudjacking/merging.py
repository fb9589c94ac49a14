# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""Whether an adapter that is merged into its model does what it did before."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer

from .encoder import Encoder
from .preprocessing import RawInput


# Largest difference of a feature's entries, in float32, up to which merging counts as exact.
MERGE_TOLERANCE = 1e-5


def merge_error(encoder: Encoder, inputs: Sequence[RawInput]) -> float:
    """Largest difference that merging the adapter makes to any entry of the features of some inputs.

    The model comes out as it went in, to the last bit; meanwhile a copy of the adapted layers is in memory.

    Args:
        encoder (`Encoder`): Its model is a `PeftModel`.
        inputs (`Sequence`): Raw inputs.
    """
    # Under bf16 or fp16 accelerate puts autocast around the outer model's `forward`; here float32 is compared.
    plain = encoder.with_model(encoder.model.get_base_model())
    with _no_tf32():
        unmerged = plain.encode(inputs)
        with _merged(encoder.model):
            return float((plain.encode(inputs) - unmerged).abs().max())


@contextmanager
def _no_tf32() -> Iterator[None]:
    """Within it, a GPU multiplies float32 as float32: TF32, cuDNN's default, rounds by more than merging may change."""
    # By the flags that transformers sets too: PyTorch raises where these and the older ones are both used
    places = (torch.backends.cudnn.conv, torch.backends.cuda.matmul)
    before = [place.fp32_precision for place in places]
    try:
        for place in places:
            place.fp32_precision = "ieee"
        yield
    finally:
        for place, precision in zip(places, before, strict=True):
            place.fp32_precision = precision


@contextmanager
def _merged(model: PeftModel) -> Iterator[None]:
    """Within it, the adapters are merged; afterwards all weights are as before."""
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer) and not module.merged]
    weights = {parameter: parameter.data for layer in layers for parameter in layer.get_base_layer().parameters()}
    values = {parameter: data.clone() for parameter, data in weights.items()}
    merged = []
    try:
        with torch.no_grad():
            for layer in layers:
                merged.append(layer)
                layer.merge()
        yield
    finally:
        for layer in merged:
            layer.unmerge()
        # Taking away what was added leaves rounding behind
        for parameter, data in weights.items():
            parameter.data = data.copy_(values[parameter])
