# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""Triggers that an attacker would try next: the true one moved, scaled, recoloured, weaker, or optimised anew."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..encoder import Encoder
from ..inversion.pixels import to_array
from ..inversion.pull import Pull
from ..triggers import AdditiveTrigger, BlendTrigger, ImageTrigger, PatchTrigger, WarpTrigger
from ..triggers.patch import moved, scaled
from ..triggers.warp import warp


# Pixels of 32 by which triggers are moved, and factors of size and strength.
_MOVES = (1, 2, 4)
_SCALES = (0.75, 1.25)
_WEAKER = 0.5
# Green, blue and red, in place of red, green and blue.
_EXCHANGED = (1, 2, 0)
_STEPS = 60
# How far, in 8-bit levels or shares of the picture's side, each step may go.
_PIXEL_RATE, _FLOW_RATE = 8.0, 0.003


def altered_triggers(
    trigger: ImageTrigger, encoder: Encoder, images: Sequence[Image.Image], target: Tensor, seed: int = 0
) -> dict[str, ImageTrigger]:
    """Altered versions of a true trigger, by name.

    Args:
        trigger (`ImageTrigger`): Patch, blend, signal or warp.
        encoder (`Encoder`): Encoder against which one of them is optimised anew, starting from the true trigger: all within
            its mask, its opacity, or 30 levels of its signal, so that it comes as near to `target` as it can.
        images (`Sequence[PIL.Image.Image]`): Clean inputs for that, of one size.
        target (`FloatTensor` of shape `(D,)`): Feature that the trigger led to before the repair.
        seed (`int`, *optional*, defaults to 0): Seed of the batches.

    Returns:
        `dict[str, ImageTrigger]`: `moved by 1`, `2`, `4` (pixels of 32), `scaled by 0.75`, `1.25`, `recoloured` (red, green and blue
        exchanged; of greys the opposite), `weaker`, `optimised anew`. What would be the trigger itself is left out: a patch that
        goes anywhere cannot be moved, one of three pixels hardly be scaled; a warp is neither scaled nor recoloured.
    """
    found: dict[str, ImageTrigger] = {}
    if not isinstance(trigger, PatchTrigger) or trigger.placement == "fixed":
        found |= {f"moved by {pixels}": _moved(trigger, -pixels / 32) for pixels in _MOVES}
    if not isinstance(trigger, WarpTrigger):
        found |= {f"scaled by {factor}": _rebuilt(trigger, factor=factor) for factor in _SCALES}
        found["recoloured"] = _recoloured(trigger)
    found["weaker"] = trigger.weakened(_WEAKER)
    found["optimised anew"] = _optimised(trigger, Pull(encoder, images, seed), target)
    return {name: each for name, each in found.items() if not _same(each, trigger)}


def _same(one: ImageTrigger, other: ImageTrigger) -> bool:
    return type(one) is type(other) and np.array_equal(one.change, other.change)


def _moved(trigger: ImageTrigger, share: float) -> ImageTrigger:
    """Up and to the left by a share of the picture's side; a signal or a warp comes in again on the other side."""
    if isinstance(trigger, WarpTrigger):
        points = trigger.flow.shape[1:]
        return WarpTrigger(_rolled(trigger.flow.transpose(1, 2, 0), share, points).transpose(2, 0, 1))
    if isinstance(trigger, AdditiveTrigger):
        return AdditiveTrigger(_rolled(trigger.delta, share, trigger.delta.shape))
    shift = _pixels(share, trigger.change.shape)
    if isinstance(trigger, BlendTrigger):
        if trigger.area == 1.0:
            return BlendTrigger(_rolled(trigger.pattern, share, trigger.pattern.shape), trigger.opacity)
        opacity, pattern = _moved_within(trigger.opacity, trigger.pattern, shift)
        return BlendTrigger(pattern, opacity) if opacity.any() else trigger
    mask, pattern = _moved_within(trigger.mask, trigger.pattern, shift)
    return PatchTrigger(mask, pattern, trigger.placement) if mask.any() else trigger


def _moved_within(mask: np.ndarray, pattern: np.ndarray, shift: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Moved, or the other way where nothing of it would be left in the picture; empty where nothing would be either way."""
    found = moved(mask, pattern, *shift)
    return found if found[0].any() else moved(mask, pattern, *(-by for by in shift))


def _rolled(values: np.ndarray, share: float, shape: Sequence[int]) -> np.ndarray:
    return np.roll(values, _pixels(share, shape), axis=(0, 1))


def _pixels(share: float, shape: Sequence[int]) -> list[int]:
    """A negative share of height and width in whole pixels, at least one."""
    return [min(round(share * side), -1) for side in shape[:2]]


def _rebuilt(trigger: ImageTrigger, factor: float) -> ImageTrigger:
    """Larger or smaller about the middle of its mask."""
    if isinstance(trigger, AdditiveTrigger):
        return AdditiveTrigger(scaled(np.ones(trigger.delta.shape[:2], bool), trigger.delta, factor)[1])
    if isinstance(trigger, BlendTrigger):
        mask, pattern = scaled(trigger.opacity > 0, trigger.pattern, factor)
        return BlendTrigger(pattern, np.where(mask, trigger.opacity.max(), 0)) if mask.any() else trigger
    mask, pattern = scaled(trigger.mask, trigger.pattern, factor)
    # Nothing is left of single pixels in the corners, for one
    return PatchTrigger(mask, pattern, trigger.placement) if mask.any() else trigger


def _recoloured(trigger: ImageTrigger) -> ImageTrigger:
    """With channels exchanged or, where these are alike, in the opposite of its greys."""
    if isinstance(trigger, AdditiveTrigger):
        exchanged = AdditiveTrigger(trigger.delta[..., _EXCHANGED])
        return AdditiveTrigger(-trigger.delta) if _same(exchanged, trigger) else exchanged

    def painted(pattern: np.ndarray) -> ImageTrigger:
        if isinstance(trigger, BlendTrigger):
            return BlendTrigger(pattern, trigger.opacity)
        return PatchTrigger(trigger.mask, pattern, trigger.placement)

    exchanged = painted(trigger.pattern[..., _EXCHANGED])
    return painted(255 - trigger.pattern) if _same(exchanged, trigger) else exchanged


def _optimised(trigger: ImageTrigger, pull: Pull, target: Tensor) -> ImageTrigger:
    """What carries clean inputs nearest to the target, starting from the true trigger."""

    def search(start: np.ndarray, stamp, rate: float) -> Tensor:
        parameter = torch.from_numpy(start.copy()).float()
        pull(
            target,
            [parameter],
            lambda x: stamp(x, parameter),
            lambda: parameter.new_zeros(()),
            steps=_STEPS,
            learning_rate=rate,
        )
        return parameter

    if isinstance(trigger, WarpTrigger):
        return WarpTrigger(search(trigger.flow, warp, _FLOW_RATE))
    if isinstance(trigger, AdditiveTrigger):
        start = torch.from_numpy(trigger.delta).permute(2, 0, 1)
        offset = search(
            np.zeros(start.shape, dtype=np.float32), lambda x, d: x + start + 30 * torch.tanh(d / 30), _PIXEL_RATE
        )
        return AdditiveTrigger(to_array(start + 30 * torch.tanh(offset / 30)))
    opacity = trigger.opacity if isinstance(trigger, BlendTrigger) else trigger.mask.astype(np.float32)
    share = torch.from_numpy(opacity)
    pattern = search(
        trigger.pattern.astype(np.float32).transpose(2, 0, 1),
        lambda x, p: (1 - share) * x + share * p.clamp(0, 255),
        _PIXEL_RATE,
    ).clamp(0, 255)
    if isinstance(trigger, BlendTrigger):
        return BlendTrigger(to_array(pattern), opacity)
    return PatchTrigger(trigger.mask, to_array(pattern).round().astype(np.uint8), trigger.placement)
