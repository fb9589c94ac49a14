# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""Taking back a run that may not stand: its weights, and the checkpoints that it wrote."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
        self._optimizers: list[tuple[Any, dict[str, Any]]] = []
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

    def keep(self, model: nn.Module, optimizers: Sequence[Any] = ()) -> None:
        """Keep what to go back to; what an earlier run left, which was interrupted, is still that.

        Args:
            model (`torch.nn.Module`): The model before training.
            optimizers (`Sequence`, *optional*): Optimisers and schedulers that outlive the run.
        """
        if self._start is None:
            self._start = StartingWeights(model)
            self._optimizers = [(each, copy.deepcopy(each.state_dict())) for each in optimizers]

    def wrote(self, checkpoint: Path) -> None:
        """The run writes a checkpoint."""
        self._checkpoints.append(checkpoint)

    def take_back(self, reason: Exception, remove: bool) -> None:
        """Put all weights back, and the optimisers that outlive the run.

        Args:
            reason (`Exception`): Why.
            remove (`bool`): Whether this process removes the checkpoints, which hold the refused patch and would load as one.
        """
        if self._start is not None:
            self._start.restore()
        for each, state in self._optimizers:
            # A copy: the next run may be taken back too
            each.load_state_dict(copy.deepcopy(state))
        self.refused = reason
        for folder in self._checkpoints if remove else []:
            shutil.rmtree(folder, ignore_errors=True)

    def let_stand(self) -> None:
        """The run was judged and may stand."""
        self._start = None
