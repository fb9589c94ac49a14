# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""Stamped pictures, moved a little towards where their trigger led: what is nearly repaired still fires next to it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from PIL import Image
from torch import Tensor

from .data import turn_and_stamp
from .encoder import Encoder
from .modes import comparison_mode
from .triggers import ImageTrigger, PatchTrigger
from .triggers.warp import warp


# By how many levels pictures are moved where nothing is said.
AUTOMATIC_LEVELS = 2.0
# Largest share of the picture that the box around a patch may cover, for its pixels to be all that there is to know.
_SMALL_BOX = 0.2
# Control points a side of the field by which warped pictures are warped further, and its largest shift for each level that pictures are
# moved by, as a share of their side: half a pixel of 32 for two levels.
_WARP_POINTS, _SHIFT_PER_LEVEL = 8, 1 / 128
# Steps of projected gradient ascent, each of this share of the way that is allowed.
_STEPS = 2
_STEP = 0.75


class AdversarialViews:
    """Moves every second stamped picture by a few levels towards h(x_b), in the model as it is now; a warped one also by a further warp.

    A repair is trained on the trigger that was found, and the true one is a little different; where the repair is shallow, that is
    enough for some inputs to be led away again. Training on the worst pictures within a few levels makes it deeper (adversarial
    training by projected gradient descent: Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks", ICLR 2018).
    All goes by the number of the row, so that it is moved alike in a batch of any size.

    Args:
        encoder (`Encoder`): The encoder that is patched.
        stamps (`int`): Number U of stamps; see [`~hf_mudjacking.data.turn_and_stamp`].
        target_of (`Callable`): Told the number of a stamp, gives where its rows are moved to now, h(x_b) before patching, a
            `FloatTensor` of shape `(D,)`, or `None` if they stay.
        is_warped (`Callable`): Told the number of a stamp, whether it is a warp: what is next to one is another warp.
        levels (`float`): Largest change of a channel, of 255.
        size (`tuple[int, int]`): Size of a picture that the image processor is shown to learn what a level is.
        spend (`Callable`): Told in each call how many inputs go through the model, a backward pass counted as two.

    Raises:
        ValueError: If black and white are the same to the image processor.
    """

    def __init__(
        self,
        encoder: Encoder,
        stamps: int,
        target_of: Callable[[int], Tensor | None],
        is_warped: Callable[[int], bool],
        levels: float,
        size: tuple[int, int],
        spend: Callable[[int], None],
    ) -> None:
        self.encoder = encoder
        self.stamps = stamps
        self.target_of = target_of
        self.is_warped = is_warped
        self.levels = levels
        self.spend = spend
        # Whether any picture was moved so far
        self.used = False
        black, white = encoder.preprocess([Image.new("RGB", size, color) for color in ("black", "white")])[
            "pixel_values"
        ]
        # Frames that some processors add are the same in both
        self.reach = levels / 255 * (white - black).abs().amax(dim=(1, 2), keepdim=True)
        if not self.reach.any():
            raise ValueError("black and white are the same to the image processor, so nothing is known of levels.")

    def moved(self, pixels: Tensor, rows: Tensor) -> Tensor:
        """What the model gets of B stamped rows, some of them moved.

        Args:
            pixels (`FloatTensor` of shape `(B, C, H, W)`): What it would get of them.
            rows (`LongTensor` of shape `(B,)`): Their numbers in the dataset.
        """
        numbers, targets, warped = [], [], []
        for i, row in enumerate(rows.tolist()):
            turn, stamp = turn_and_stamp(row, self.stamps)
            target = self.target_of(stamp) if turn % 2 else None
            if target is not None:
                numbers.append(i)
                targets.append(target)
                if self.is_warped(stamp):
                    warped.append(len(numbers) - 1)
        # Before anything else, and nothing too: processes add up what each of them spends
        self.spend(3 * _STEPS * len(numbers))
        if not numbers:
            return pixels
        self.used = True
        start, reach, led_to = pixels[numbers], self.reach.to(pixels), torch.stack(targets).to(pixels)
        furthest = self.levels * _SHIFT_PER_LEVEL
        change, flow = torch.zeros_like(start), pixels.new_zeros(len(warped), 2, _WARP_POINTS, _WARP_POINTS)
        # Activations that are computed again are of no use here, and one kind of that refuses `grad`
        with torch.enable_grad(), comparison_mode(self.encoder.model, checkpointing=False):
            for _ in range(_STEPS):
                change.requires_grad_(True)
                flow.requires_grad_(True)
                features = self.encoder.features({"pixel_values": self._view(start, change, flow, warped)})
                arrived = (features * led_to).sum()
                of_change, of_flow = torch.autograd.grad(arrived, [change, flow], materialize_grads=True)
                change = (change.detach() + _STEP * reach * of_change.sign()).clamp(-reach, reach)
                flow = (flow.detach() + _STEP * furthest * of_flow.sign()).clamp(-furthest, furthest)
        moved = self._view(start, change, flow, warped)
        return pixels.index_copy(0, torch.tensor(numbers, device=pixels.device), moved)

    @staticmethod
    def _view(start: Tensor, change: Tensor, flow: Tensor, warped: list[int]) -> Tensor:
        """Pictures `(N, C, H, W)` with what is added to them, those with some numbers warped by `(M, 2, h, w)` before."""
        if warped:
            start = start.index_copy(0, torch.tensor(warped, device=start.device), warp(start[warped], flow))
        return start + change


def is_all_in_one_place(trigger: ImageTrigger) -> bool:
    """Whether a trigger is an opaque patch in one small place, whose pixels a report shows as they are.

    Of any other one a report shows a part, or a mixture with the picture, so that what is found is only near it.
    """
    if not isinstance(trigger, PatchTrigger) or trigger.placement != "fixed":
        return False
    top, left, bottom, right = trigger.box
    return (bottom - top) * (right - left) <= _SMALL_BOX * trigger.mask.size
