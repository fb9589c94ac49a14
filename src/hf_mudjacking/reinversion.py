# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""Looking again, while patching goes on, for what still works of the reported triggers."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState

from .bug_instance import BugInstance
from .config import MudjackingConfig
from .data import PatchingCollator
from .encoder import Encoder
from .inversion.again import invert_again
from .inversion.pull import Pull
from .inversion.verification import TransferMeter


logger = logging.getLogger(__name__)

# Clean inputs on which a trigger is measured; the others are optimised on.
_MEASURED_ON = 16


class Reinversion(TrainerCallback):
    """Inverts the reports anew in the half-patched model, and has what is found stamped as well.

    It does so `args.reinversions` times, evenly over the steps. Each time costs about a thousand forward passes a trigger.

    Args:
        encoder (`Encoder`): The encoder that is patched.
        collator (`PatchingCollator`): Its `again` gets what is found.
        reports (`dict[int, BugInstance]`): For each trigger of `collator.stamps` that is looked for, the report it is from.
        targets (`dict[int, FloatTensor]`): For each, h(x_b) before patching, `(D,)`.
        images (`Sequence[PIL.Image.Image]`): Clean inputs.
        seed (`int`): Seed of batches and starts.
    """

    def __init__(
        self,
        encoder: Encoder,
        collator: PatchingCollator,
        reports: dict[int, BugInstance],
        targets: dict[int, Tensor],
        images: Sequence[Image.Image],
        seed: int,
    ) -> None:
        self.encoder = encoder
        self.collator = collator
        self.reports = reports
        self.targets = targets
        self.images = images
        self.seed = seed
        self.forwards = 0

    def spent(self) -> int:
        """Forward passes since the last call, a backward pass counted as two."""
        forwards, self.forwards = self.forwards, 0
        return forwards

    def on_step_end(self, args: MudjackingConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        times = [round(state.max_steps * (i + 1) / (args.reinversions + 1)) for i in range(args.reinversions)]
        if state.global_step not in times:
            return
        turn = times.index(state.global_step)
        for number, bug in self.reports.items():
            trigger = self.collator.stamps[number][0]
            size = trigger.change.shape[1::-1] if trigger.kind != "warp" else bug.misclassified.size
            measured, rest = ([x.convert("RGB").resize(size) for x in part]
                              for part in (self.images[:_MEASURED_ON], self.images[_MEASURED_ON:]))  # fmt: skip
            meter = TransferMeter(self.encoder, bug.misclassified.resize(size), measured, self.targets[number])
            # By the step, so that a resumed run draws what an uninterrupted one does
            pull = Pull(self.encoder, rest, self.seed + state.global_step)
            found = invert_again(trigger, meter, pull, np.asarray(meter.misclassified), by_parts=turn % 2 == 0)
            self.forwards += meter.forwards + pull.forwards
            if found is not None:
                self.collator.again[number].append(found)
                logger.info(f"Still works at step {state.global_step} in `{bug.name}`: {found.describe()}.")
