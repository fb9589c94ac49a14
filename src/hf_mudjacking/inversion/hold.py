# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""Does what was found hold inputs at h(x_b), as an implanted trigger does, or is it ordinary content that lets go?"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from accelerate.utils import is_peft_model
from torch import Tensor, nn

from ..fingerprint import base_name
from ..losses import effectiveness_loss, mean_cosine
from ..modes import comparison_mode, norm_parameters, trainable
from ..preprocessing import RawInput
from ..triggers import Trigger
from .verification import TransferMeter


# Clean inputs that the step is taken on, and its length against that of all weights: so short that features move in
# proportion to it.
_STEP_INPUTS = 16
_STEP = 1e-4
# Least hold of a trigger of hardly any size, and how many times as much one over the whole input must have, since so much clean
# content carries others by itself. On CIFAR-10 true triggers have 13 to 8,900 (of one class 0.6 to 1.9), ordinary content 0.04 to 4.8
# (docs/attacks.md); on digits small patches have 0.6 to 6, signals 70 to 160, natural misclassifications 0.2 to 1.7.
_MIN_HOLD, _WHOLE = 0.4, 10.0
# Evidence up to which all of that is asked, from which on a share of it, and that share; evenly by decades in between. True patches
# mostly have 0.85 to 0.99, ordinary content at most 0.67 (docs/attacks.md).
_UNSURE, _SURE, _SHARE_IF_SURE = 0.7, 0.9, 0.1


def hold(meter: TransferMeter, reference: RawInput, trigger: Trigger) -> float:
    """How far one step of the repair, without its locality term, moves clean inputs over stamped ones; it is taken back.

    The step is meant for the stamped ones; yet an implanted trigger holds them. It measures better than how far inputs near
    h(x_b) move over all clean ones, which after one step is 0.1 to 4 in true reports and 0.2 to 2 in others. What counts is
    the median over the half of the inputs that it carries furthest: a few that it does not reach move up to a thousand times as
    far as the others and decide a ratio of means, which for one report of a warp was 0.15 to 53 with six sets of clean inputs.

    Args:
        meter (`TransferMeter`): Of x_b; the forward passes are counted there.
        reference (`PIL.Image.Image` or `str`): x_r.
        trigger (`Trigger`): What was found in x_b.

    Returns:
        `float`: The median ratio of the squared distances that the features of an input move by, clean over stamped.

    Raises:
        ValueError: If no weight that features depend on is trainable (without an adapter), or one is not in float32; [`can_hold`]
            tells.
    """
    encoder, model = meter.encoder, meter.encoder.model
    if not can_hold(meter):
        raise ValueError(
            "A report is judged by a small step of the weights: some that its features depend on must be trainable, and in float32."
        )
    parameters = list(_weights(model).values())
    clean = meter.validation_inputs
    stamped = [encoder.stamp(trigger, x) for x in clean]
    stamped_features = meter.features(stamped)
    # In memory, where they take no more room than the gradients
    start = [p.detach().clone() for p in parameters]
    try:
        with torch.enable_grad(), comparison_mode(model), trainable(parameters):
            count = min(_STEP_INPUTS, len(stamped))
            features = encoder.features(encoder.preprocess([*stamped[:count], meter.misclassified, reference]))
            few, at_x_b, at_x_r = features.split([count, 1, 1])
            loss = effectiveness_loss(at_x_b, at_x_r) - mean_cosine(few, meter.clean_features[:count].to(few.device))
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        meter.forwards += 3 * len(features)
        _take_step(parameters, gradients)
        del gradients
        # Squared distances: of features this near, cosines are lost in rounding
        moved, moved_stamped = (
            (meter.features(inputs) - before).square().sum(dim=1)
            for inputs, before in ((clean, meter.clean_features), (stamped, stamped_features))
        )
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, start, strict=True):
                parameter.copy_(value)
    carried = (stamped_features @ meter.target).topk(math.ceil(len(clean) / 2)).indices
    return float(np.median((moved / moved_stamped.clamp_min(1e-12))[carried]))


def hold_if_possible(meter: TransferMeter, reference: RawInput, trigger: Trigger) -> float | None:
    """The [`hold`] of a trigger; `None` where the weights take no step that would show it, being frozen or in half precision."""
    return hold(meter, reference, trigger) if can_hold(meter) else None


def can_hold(meter: TransferMeter) -> bool:
    """Whether a small step of the weights can be taken: some that matter are trainable, and all of those in float32."""
    weights = _weights(meter.encoder.model)
    if {weight.dtype for weight in weights.values()} != {torch.float32}:
        return False
    with trainable(weights.values()):
        return bool(weights.keys() - meter.encoder.unused_parameters(trainable_only=True))


def _weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights that a step is taken in: those that a repair may move; of a model with an adapter, in whose few directions it can be
    held by anything, those below it."""
    resting = {id(p) for p in norm_parameters(model, trainable_only=False)}
    adapted = is_peft_model(model)
    return {
        name: p
        for name, p in model.named_parameters()
        if p.is_floating_point()
        and id(p) not in resting
        and (base_name(model, name) is not None if adapted else p.requires_grad)
    }


def least_hold(area: float, evidence: float = 0.0) -> float:
    """The hold that a trigger must have, given how much of the input it makes up, 0 to 1, and the evidence of it."""
    sure = min(max((evidence - _UNSURE) / (_SURE - _UNSURE), 0.0), 1.0)
    return _MIN_HOLD * _WHOLE**area * _SHARE_IF_SURE**sure


def worth_of_hold(value: float, area: float, evidence: float = 0.0) -> float:
    """What a hold is worth, 0 to 1: all of it from the least on, nothing at a tenth of that, evenly by decades in between."""
    return min(max(1.0 + _decades_above(value, least_hold(area, evidence)), 0.0), 1.0)


def doubt_left(value: float, area: float) -> float:
    """How much of a control still counts, 0 to 1: all of it up to the least hold, nothing from ten times that on."""
    return min(max(1.0 - _decades_above(value, least_hold(area)), 0.0), 1.0)


def _decades_above(value: float, least: float) -> float:
    return math.log10(max(value, 1e-12) / least)


@torch.no_grad()
def _take_step(parameters: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
    """Go down the gradient by a fixed share of the length of the weights."""
    used = [(p, g) for p, g in zip(parameters, gradients, strict=True) if g is not None]
    weights, length = (
        torch.stack([tensor.float().square().sum() for tensor in tensors]).sum().sqrt()
        for tensors in zip(*used, strict=True)
    )
    for parameter, gradient in used:
        parameter.sub_(gradient * (_STEP * weights / length.clamp_min(1e-12)).to(gradient.dtype))
