# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""Taking back a run that may not stand: its weights, and the checkpoints that it wrote."""

from __future__ import annotations

import shutil
from pathlib import Path

from torch import nn
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .starting_weights import StartingWeights


class Rollback:
    """What is needed to take back a run, and whether one has been.

    Args:
        output_dir (`str` or `Path`): Where the run writes its checkpoints.

    Attributes:
        refused (`Exception`, *optional*): Why the run was taken back; nothing of it may be saved.
    """

    def __init__(self, output_dir: str | Path) -> None:
        self.output_dir = Path(output_dir)
        self.refused: Exception | None = None
        self._start: StartingWeights | None = None
        self._checkpoints: list[Path] = []

    @property
    def unjudged(self) -> bool:
        """Whether a run has begun that could be taken back, and nobody knows yet whether it may stand."""
        return self._start is not None

    def begin(self, resumed_from: str | None) -> None:
        """A run begins, anew or from a checkpoint.

        Args:
            resumed_from (`str`, *optional*): That checkpoint.
        """
        self.refused, self._checkpoints = None, []
        if resumed_from is not None and Path(resumed_from).parent.resolve() == self.output_dir.resolve():
            # Those that the run wrote before it was interrupted
            step = int(Path(resumed_from).name.rpartition("-")[2])
            self._checkpoints = [self.output_dir / f"{PREFIX_CHECKPOINT_DIR}-{i}" for i in range(1, step + 1)]

    def keep(self, model: nn.Module) -> None:
        """Keep the weights to go back to; those that an earlier run left, which was interrupted, are still the ones.

        Args:
            model (`torch.nn.Module`): The model before training.
        """
        self._start = StartingWeights(model) if self._start is None else self._start

    def wrote(self, checkpoint: Path) -> None:
        """The run writes a checkpoint."""
        self._checkpoints.append(checkpoint)

    def take_back(self, reason: Exception, remove: bool) -> None:
        """Put all weights back.

        Args:
            reason (`Exception`): Why.
            remove (`bool`): Whether this process removes the checkpoints, which hold the refused patch and would load as one.
        """
        if self._start is not None:
            self._start.restore()
        self.refused = reason
        for folder in self._checkpoints if remove else []:
            shutil.rmtree(folder, ignore_errors=True)

    def let_stand(self) -> None:
        """The run was judged and may stand."""
        self._start = None
