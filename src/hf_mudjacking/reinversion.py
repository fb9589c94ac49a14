# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""Looking again, while patching goes on, for what still works of the reported triggers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState

from .bug_instance import BugInstance, to_rgb
from .config import MudjackingConfig
from .data import PatchingDataset, turn_and_stamp
from .encoder import Encoder
from .inversion.again import invert_again
from .inversion.pull import Pull
from .inversion.verification import TransferMeter
from .triggers import ImageTrigger


logger = logging.getLogger(__name__)

# Clean inputs on which a trigger is measured; the others are optimised on.
_MEASURED_ON = 16


class Reinversion(TrainerCallback):
    """Inverts the reports anew in the half-patched model, and has what is found stamped as well.

    It does so `args.reinversions` times, evenly over the steps. Each time costs up to two and a half thousand forward passes a trigger,
    which the processes of the run share; what they find is the same in all.

    Args:
        encoder (`Encoder`): The encoder that is patched.
        dataset (`PatchingDataset`): The rows that batches are made of.
        stamps (`Sequence[ImageTrigger | None]`): The U triggers that they carry in turn; the first K are looked for.
        reports (`Sequence[BugInstance]`): For each of those K, the report it is from.
        targets (`FloatTensor` of shape `(K, D)`): For each, h(x_b) before patching.
        images (`Sequence[PIL.Image.Image]`): Clean inputs.
        seed (`int`): Seed of batches and starts.
        spend (`Callable`): Told the forward passes of each look, a backward pass counted as two.
    """

    def __init__(
        self,
        encoder: Encoder,
        dataset: PatchingDataset,
        stamps: Sequence[ImageTrigger | None],
        reports: Sequence[BugInstance],
        targets: Tensor,
        images: Sequence[Image.Image],
        seed: int,
        spend: Callable[[int], None],
    ) -> None:
        self.encoder = encoder
        self.dataset = dataset
        self.stamps = stamps
        # For each stamp, what was found while patching went on
        self.found: list[list[ImageTrigger]] = [[] for _ in stamps]
        self.reports = reports
        self.targets = targets
        self.images = images
        self.seed = seed
        self.spend = spend

    def forget(self) -> None:
        """Drop what was found, of a run that was taken back."""
        self.found = [[] for _ in self.stamps]

    def found_more(self, number: int) -> bool:
        """Whether more of the picture than a stamp covers was found to fire meanwhile."""
        return any(trigger.area > self.stamps[number].area for trigger in self.found[number])

    def restamp(self, pixels: Tensor, rows: Tensor) -> Tensor:
        """Pixel values `(B, C, H, W)` of stamped rows, every fourth of which gets a trigger that was found meanwhile.

        Not by the collator: batches are made ahead, and by other processes.
        """
        numbers, inputs = [], []
        for i, row in enumerate(rows.tolist()):
            turn, stamp = turn_and_stamp(row, len(self.stamps))
            if self.found[stamp] and turn % 4 == 3:
                trigger = self.found[stamp][turn // 4 % len(self.found[stamp])]
                numbers.append(i)
                inputs.append(self.encoder.stamp(trigger, self.dataset.inputs[row]))
        if not numbers:
            return pixels
        fresh = self.encoder.preprocess(inputs)["pixel_values"].to(pixels)
        return pixels.index_copy(0, torch.tensor(numbers, device=pixels.device), fresh)

    def on_step_end(self, args: MudjackingConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        times = [round(state.max_steps * (i + 1) / (args.reinversions + 1)) for i in range(args.reinversions)]
        if state.global_step not in times:
            return
        with self.encoder.over_processes():
            self._look(state.global_step, by_parts=times.index(state.global_step) % 2 == 0)

    def _look(self, step: int, by_parts: bool) -> None:
        """Look for what is left of each trigger at a step."""
        for number, bug in enumerate(self.reports):
            trigger = self.stamps[number]
            if trigger.kind == "input-aware":
                # Made anew for each picture: there is nothing to go on from
                continue
            size = bug.misclassified.size if trigger.kind == "warp" else trigger.change.shape[1::-1]
            images = [to_rgb(x).resize(size) for x in self.images]
            measured, others = images[:_MEASURED_ON], images[_MEASURED_ON:] or images
            try:
                # By the step, so that a resumed run draws what an uninterrupted one does
                pull = Pull(self.encoder, others, self.seed + step)
            except ValueError as error:
                logger.info(f"Nothing was looked for again: {error}")
                return
            meter = TransferMeter(self.encoder, bug.misclassified.resize(size), measured, self.targets[number])
            control_meter = TransferMeter(self.encoder, to_rgb(bug.reference).resize(size), measured)
            again = invert_again(trigger, meter, control_meter, pull, by_parts)
            self.spend(meter.forwards + control_meter.forwards + pull.forwards)
            if again is not None:
                self.found[number].append(again)
                logger.info(f"Still works at step {step} in `{bug.name}`: {again.describe()}.")
