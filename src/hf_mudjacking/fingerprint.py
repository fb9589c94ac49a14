# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""Hashes by which a patch names the model it belongs to and the reports it repairs."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from .bug_instance import BugInstance


if TYPE_CHECKING:
    from .clean_inputs import CleanInputs
    from .preprocessing import RawInput


# Clean inputs that stand for all.
_CLEAN_INPUTS = 8


def tensor_sha256(tensor: Tensor) -> str:
    """SHA-256 of a tensor's bytes, row after row, as they lie in memory."""
    flat = tensor.detach().cpu().contiguous().flatten()
    return hashlib.sha256(flat.view(torch.uint8).numpy()).hexdigest()


def weights_sha256(model: nn.Module, without: Collection[str] = ()) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of a model's weights, one tensor after the other.

    Names are those in memory, in alphabetic order, so that neither shards nor the names that `save_pretrained` writes
    matter. Of a model with an adapter, unmerged, the weights below the adapter are taken.

    Args:
        model (`torch.nn.Module`): The model.
        without (`Collection[str]`, *optional*): Names of weights that do not count, as [`base_names`] gives them.

    Returns:
        `str`: 64 hexadecimal digits.
    """
    weights = {name: tensor for name, tensor in base_weights(model).items() if name not in without}
    total = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name]
        line = f"{name} {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} {tensor_sha256(tensor)}\n"
        total.update(line.encode())
    return total.hexdigest()


def base_weights(model: nn.Module) -> dict[str, Tensor]:
    """State dict of the model below an adapter, under the names it has without one; of any other model, its own."""
    return {base: tensor for name, tensor in model.state_dict().items() if (base := base_name(model, name))}


def base_name(model: nn.Module, name: str) -> str | None:
    """Name of a weight in the model without its adapter; `None` for one that belongs to the adapter."""
    parts, plain = name.split("."), []
    module = model
    for depth, part in enumerate(parts):
        if isinstance(module, BaseTunerLayer) and part != "base_layer":
            return None
        if isinstance(module, AuxiliaryTrainingWrapper) and part != "original_module":
            return None
        if not isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            plain.append(part)
        if depth < len(parts) - 1:
            module = getattr(module, part)
    return ".".join(plain).removeprefix("base_model.model.")


def report_sha256(bug: BugInstance) -> str:
    """SHA-256 of a report's two inputs: of pictures the size and RGB pixels, of texts their UTF-8; not of its name.

    By it a client who has the report can tell whether a patch repairs it. It reveals no pixel, but it confirms a guess:
    who has both inputs already, or for short texts tries likely ones, learns whether they were reported. Remove
    `bug_ids` from the record of a patch for texts where that matters.
    """
    return _inputs_sha256(bug.modality, (bug.misclassified, bug.reference))


def clean_inputs_sha256(inputs: CleanInputs, seed: int) -> str:
    """SHA-256 of some clean inputs, by which a run that resumes can tell whether it has those that it began with.

    Of eight at random, and of how many rows there are: all of them would have to be read for it.
    """
    return _inputs_sha256(f"{inputs.column}|{inputs.rows_in_all}", inputs.sample(_CLEAN_INPUTS, seed))


def _inputs_sha256(start: str, inputs: Iterable[RawInput]) -> str:
    total = hashlib.sha256(start.encode())
    for value in inputs:
        data = value.encode(errors="surrogatepass") if isinstance(value, str) else value.tobytes()
        size = len(data) if isinstance(value, str) else value.size
        total.update(f"|{size}|".encode() + data)
    return total.hexdigest()
