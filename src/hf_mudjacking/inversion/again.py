# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""What is left of a trigger in a half-patched model: the same report, inverted anew.

A repair of what was found leaves its neighbours alive, and brings to light what was not needed to fire: of four corners the
encoder reads one, until that one is repaired.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..spectrum import CleanSpectrum, inverse_spectrum
from ..triggers import AdditiveTrigger, BlendTrigger, ImageTrigger, PatchTrigger, WarpTrigger
from ..triggers.warp import warp
from .parts_beside import parts_beside
from .patch_search import SMALL
from .pixels import to_array
from .pull import Pull
from .result import AREA_PRICE
from .verification import TransferMeter
from .whole_picture import beyond_control, find_signal


# Transfer, above what clean content has, from which something is left to be repaired.
_LEAST_TRANSFER = 0.1
# The same for parts of x_b that were put together: ordinary content of digits reaches 0.15, corners that the attacker set 0.12 to 0.3,
# and more when looked for again. What is stamped in vain costs locality.
_LEAST_OF_PARTS = 0.2
_STEPS = 25
# Learning rates, and the start, as shares of what each parameter may be: deviations, levels, shares of the picture's side.
_OFFSET_RATE, _PIXEL_RATE, _FLOW_RATE = 0.1, 8.0, 0.01
_START = 0.5
_PENALTY = 0.05
# Levels by which the pattern of a patch or a blend is changed.
_PATTERN_SCALE = 64.0


def invert_again(
    trigger: ImageTrigger, meter: TransferMeter, control_meter: TransferMeter, pull: Pull, by_parts: bool
) -> ImageTrigger | None:
    """The strongest trigger near one that was found, in the model as it is now.

    It must do more than ordinary content does: in any encoder, a part of a picture carries others some of the way to that
    picture, and what is optimised to carry them anywhere does so. To make these do nothing costs locality.

    Args:
        trigger (`ImageTrigger`): What was found in x_b before patching.
        meter (`TransferMeter`): Of x_b; measures how far clean inputs go towards h(x_b), as it was before patching.
        control_meter (`TransferMeter`): Of x_r, in the model as it is now.
        pull (`Pull`): Optimiser on clean inputs.
        by_parts (`bool`): Of a patch, whether to look for other parts of x_b that fire now, or a signal of which a large one is
            a part, instead of another pattern.

    Returns:
        `ImageTrigger`: With a transfer that is at least 0.1 (for more parts of x_b 0.2) above that of the control and, for a patch,
        the price of its area. The control of more parts of x_b is what parts of x_r do that are looked for likewise, that of any
        other trigger is one that is optimised likewise to lead to h(x_r). `None` if nothing has.
    """
    if isinstance(trigger, PatchTrigger) and by_parts:
        # A third of a picture with a signal in it carries others as the signal does, and can be taken for the trigger
        signal = _signal_instead(meter, control_meter, pull) if trigger.area > SMALL else None
        return signal or _more_of_it(trigger, meter, control_meter.misclassified)
    search = {"warp": _warp, "additive": _signal}.get(trigger.kind, _pattern)
    found, control = (search(trigger, m.target, pull) for m in (meter, control_meter))
    transfer, by_itself = (float(m.transfer([e])[0]) for m, e in ((meter, found), (control_meter, control)))
    price = AREA_PRICE * trigger.area if isinstance(trigger, PatchTrigger) else 0.0
    return found if transfer - max(by_itself, 0.0) - price >= _LEAST_TRANSFER else None


def _signal_instead(meter: TransferMeter, control_meter: TransferMeter, pull: Pull) -> ImageTrigger | None:
    """The signal in x_b, if there is one that works."""
    clean = CleanSpectrum.of(pull.pixels)
    found, control = (find_signal(m, pull, clean) for m in (meter, control_meter))
    if found is None or beyond_control(found, control, control_meter)[1] < _LEAST_TRANSFER:
        return None
    return found.trigger


def _more_of_it(trigger: PatchTrigger, meter: TransferMeter, reference: Image.Image) -> PatchTrigger | None:
    """A trigger with the parts of x_b that fire beside it, if they do more than parts of x_r do.

    Of a few windows of any picture that are put together for it, some carry others a good part of the way to h(x_b): the control
    is what can be put together of x_r likewise or, where that is more, as much of x_r in the same places.
    """
    own = Image.fromarray(np.where(trigger.mask[..., None], np.asarray(meter.misclassified), np.asarray(reference)))
    control_meter = TransferMeter(meter.encoder, own, meter.validation_inputs, meter.target, meter.clean_features)
    mask, control = (parts_beside(trigger, each) for each in (meter, control_meter))
    (transfer,) = meter.transfer_of_masks([mask])
    by_itself = control_meter.transfer_of_masks([mask, control])
    meter.forwards += control_meter.forwards
    price, control_price = (AREA_PRICE * float((each & ~trigger.mask).mean()) for each in (mask, control))
    gain = transfer - price - max(float(by_itself[0]), float(by_itself[1]) - control_price, 0.0)
    return PatchTrigger.from_image(meter.misclassified, mask) if gain >= _LEAST_OF_PARTS else None


def _signal(trigger: AdditiveTrigger, target: Tensor, pull: Pull) -> AdditiveTrigger:
    """Another signal within what the report leaves open, from a random start."""
    delta = torch.from_numpy(trigger.delta).permute(2, 0, 1)
    level = float(np.sqrt(np.square(trigger.delta).mean()))
    spread = torch.full_like(delta, level / 2) if trigger.spread is None else torch.from_numpy(trigger.spread)
    offset = _START * torch.randn(delta.shape, generator=pull.generator)
    pull(
        target,
        [offset],
        lambda x: x + delta + inverse_spectrum(spread * offset),
        lambda: _PENALTY * offset.square().mean(),
        steps=_STEPS,
        learning_rate=_OFFSET_RATE,
    )
    return AdditiveTrigger(to_array(delta + inverse_spectrum(spread * offset)))


def _warp(trigger: WarpTrigger, target: Tensor, pull: Pull) -> WarpTrigger:
    """Another field of about the same size, from a random start near it."""
    found = torch.from_numpy(trigger.flow)
    size = found.square().mean()
    flow = found + _START * size.sqrt() * torch.randn(found.shape, generator=pull.generator)
    pull(
        target,
        [flow],
        lambda x: warp(x, flow),
        lambda: _PENALTY * flow.square().mean() / size,
        steps=_STEPS,
        learning_rate=_FLOW_RATE,
    )
    return WarpTrigger(flow)


def _pattern(trigger: PatchTrigger | BlendTrigger, target: Tensor, pull: Pull) -> ImageTrigger:
    """Another pattern under the same mask or opacity."""
    blend = isinstance(trigger, BlendTrigger)
    share = torch.from_numpy(trigger.opacity if blend else trigger.mask.astype(np.float32))
    start = torch.from_numpy(trigger.pattern.astype(np.float32)).permute(2, 0, 1)
    offset = torch.zeros_like(start)
    pull(
        target,
        [offset],
        lambda x: (1 - share) * x + share * (start + offset).clamp(0, 255),
        lambda: _PENALTY * (offset / _PATTERN_SCALE).square().mean(),
        steps=_STEPS,
        learning_rate=_PIXEL_RATE,
    )
    # Levels: as floats, a nearly black one would be taken for one from 0 to 1
    pattern = to_array((start + offset).clamp(0, 255).round()).astype(np.uint8)
    return BlendTrigger(pattern, trigger.opacity) if blend else PatchTrigger(trigger.mask, pattern, trigger.placement)
