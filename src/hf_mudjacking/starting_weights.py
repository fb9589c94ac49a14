# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""The weights that a model has, to be put back later."""

from __future__ import annotations

import tempfile

import torch
from torch import Tensor, nn


class StartingWeights:
    """A copy on disk of what training may change: trainable parameters, and all buffers.

    In memory it would be as large as the model. The file, in the folder for temporary files (`TMPDIR`), has no name: nothing
    is left of it when the object is gone or the process is killed.

    Args:
        model (`torch.nn.Module`): The model before training.

    Raises:
        OSError: If there is no room for it.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.names = [name for name, p in model.named_parameters() if p.requires_grad]
        self.names += [name for name, _ in model.named_buffers()]
        self._file = tempfile.TemporaryFile()
        tensors = self._tensors()
        for name in self.names:
            self._file.write(memoryview(_as_bytes(tensors[name].detach().cpu()).numpy()))
        self._file.flush()

    @torch.no_grad()
    def restore(self) -> None:
        """Put them back, bit by bit, and drop the gradients."""
        tensors = self._tensors()
        self._file.seek(0)
        for name in self.names:
            value = torch.empty(tensors[name].shape, dtype=tensors[name].dtype)
            self._file.readinto(memoryview(_as_bytes(value).numpy()))
            tensors[name].copy_(value)
        self.model.zero_grad(set_to_none=True)

    def _tensors(self) -> dict[str, Tensor]:
        return {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}


def _as_bytes(tensor: Tensor) -> Tensor:
    """The memory of a contiguous tensor, as bytes."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)
