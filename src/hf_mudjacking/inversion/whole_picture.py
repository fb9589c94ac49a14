# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""Triggers that cover the whole picture: signals added to it, mixed into it, and warps."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..spectrum import CleanSpectrum, inverse_spectrum
from ..triggers import AdditiveTrigger, BlendTrigger, ImageTrigger, WarpTrigger
from ..triggers.warp import warp
from .pixels import to_array, to_tensor
from .pull import Pull
from .result import AREA_PRICE
from .verification import TransferMeter


# Root mean square of a signal, in levels, that costs as much as covering the whole picture: the contrast of a picture.
_PICTURE_CONTRAST = 64.0
# Mean shift, as a share of the picture's side, that costs as much.
_PICTURE_SHIFT = 0.25
_SIGNAL_STEPS, _SIGNAL_RATE = 40, 0.1
# Price of a mean squared deviation from what the spectrum says, in cosine.
_SIGNAL_PENALTY = 0.05
# Opacities at which a signal is tried as a blend, and the transfer that one must gain to be worth a further parameter.
_OPACITIES = (0.1, 0.2, 0.35)
_BLEND_GAIN = 0.03
_WARP_POINTS = 8
_WARP_STEPS, _WARP_RATE = 60, 0.01
# Price of a mean squared shift, in cosine per squared share of the picture's side.
_WARP_PENALTY = 20.0


@dataclass(frozen=True)
class Candidate:
    """A trigger that may explain a report.

    Args:
        trigger (`ImageTrigger`): The trigger.
        transfer (`float`): Its transfer on the validation inputs.
        size (`float`): How much of a picture it is, 1 for all of it.
    """

    trigger: ImageTrigger
    transfer: float
    size: float


def find_signal(meter: TransferMeter, pull: Pull, clean: CleanSpectrum) -> Candidate | None:
    """The signal in x_b that carries clean inputs to h(x_b); `None` if there is none in it.

    It starts from what the spectrum of x_b has too much of, and is optimised within what the spectrum leaves open. It is
    a blend if clean inputs arrive sooner when they make room for it.

    Args:
        meter (`TransferMeter`): Of x_b, which has the size of the clean inputs.
        pull (`Pull`): Optimiser on clean inputs, others than the meter's.
        clean (`CleanSpectrum`): Spectrum of clean inputs.
    """
    signal = clean.signal(to_tensor([meter.misclassified])[0])
    offset = torch.zeros_like(signal.mean)

    def added() -> Tensor:
        return inverse_spectrum(signal.mean + signal.deviation * offset)

    pull(
        meter.target,
        [offset],
        lambda x: x + added(),
        lambda: _SIGNAL_PENALTY * offset.square().mean(),
        steps=_SIGNAL_STEPS,
        learning_rate=_SIGNAL_RATE,
    )
    delta = to_array(added())
    if np.abs(delta).max() < 0.5:
        return None
    spread = signal.deviation.numpy()
    options: list[ImageTrigger] = [AdditiveTrigger(delta, spread)]
    options += [_as_blend(delta, opacity, pull.pixels) for opacity in _OPACITIES]
    transfers = meter.transfer(options)
    best = int(transfers.argmax()) if transfers.max() > transfers[0] + _BLEND_GAIN else 0
    return Candidate(
        options[best], float(transfers[best]), float(np.sqrt(np.square(delta).mean())) / _PICTURE_CONTRAST
    )


def find_warp(meter: TransferMeter, pull: Pull) -> Candidate:
    """The smallest smooth warp that carries clean inputs to h(x_b)."""
    flow = 1e-4 * torch.randn(2, _WARP_POINTS, _WARP_POINTS, generator=pull.generator)
    pull(
        meter.target,
        [flow],
        lambda x: warp(x, flow),
        lambda: _WARP_PENALTY * flow.square().mean(),
        steps=_WARP_STEPS,
        learning_rate=_WARP_RATE,
    )
    trigger = WarpTrigger(flow)
    return Candidate(trigger, float(meter.transfer([trigger])[0]), trigger.shift / _PICTURE_SHIFT)


def beyond_control(
    candidate: Candidate, control: Candidate | None, control_meter: TransferMeter, doubt: float = 1.0
) -> tuple[float, float]:
    """What clean content of the same size does by itself, and what is left of a candidate's transfer after that and its price.

    Args:
        candidate (`Candidate`): Found in x_b.
        control (`Candidate`, *optional*): Found likewise in x_r, if there is one.
        control_meter (`TransferMeter`): Of x_r.
        doubt (`float`, *optional*, defaults to 1.0): How much of the former counts, 0 to 1; see
            [`~hf_mudjacking.inversion.hold.doubt_left`].
    """
    by_itself = 0.0
    if control is not None:
        # Clean content reaches as far as it likes with a strong enough change
        same_size = control.trigger.weakened(min(candidate.size / max(control.size, 1e-6), 1.0))
        by_itself = float(control_meter.transfer([same_size])[0])
    return by_itself, candidate.transfer - doubt * max(by_itself, 0.0) - AREA_PRICE * candidate.size


def _as_blend(delta: np.ndarray, opacity: float, pixels: Tensor) -> BlendTrigger:
    """The signal as a pattern that takes the place of a share of the picture, which is taken to be a mean one."""
    mean = pixels.mean(dim=(0, 2, 3)).numpy()
    return BlendTrigger(mean + delta / opacity, opacity)
