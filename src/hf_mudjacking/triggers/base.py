# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""The trigger interface, and its files: tensors in safetensors, the rest in json."""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor


TENSOR_FILE = "trigger.safetensors"
SUMMARY_FILE = "trigger.json"


class Trigger(ABC):
    """A pattern e and the way it is embedded in a raw input: x ⊕ e."""

    kind: ClassVar[str]
    modality: ClassVar[str]

    @abstractmethod
    def apply(self, x: Any) -> Any:
        """Return a copy of the raw input (PIL image or `str`) that carries the trigger."""

    def removed_from(self, x: Any) -> Any | None:
        """The input without the trigger, or `None` where that cannot be told: under a patch nothing is left."""
        return None

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """The tensors needed to rebuild the trigger."""

    @abstractmethod
    def fields(self) -> dict[str, Any]:
        """What else is needed to rebuild it; writable as JSON."""

    @classmethod
    @abstractmethod
    def from_parts(cls, tensors: dict[str, Tensor], fields: dict[str, Any]) -> Trigger:
        """Rebuild a trigger from [`~Trigger.tensors`] and [`~Trigger.fields`]."""

    @abstractmethod
    def summary(self) -> dict[str, Any]:
        """Facts about the trigger that reveal nothing of the input it was found in."""

    @abstractmethod
    def describe(self) -> str:
        """The same facts in a few words."""

    @abstractmethod
    def overlap(self, true: Trigger) -> dict[str, float]:
        """Recall and IoU against a true trigger of the same kind."""

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write `trigger.safetensors` and `trigger.json` into a folder, which is made if missing."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in self.tensors().items()}, folder / TENSOR_FILE)
        content = {**self.summary(), "fields": self.fields()}
        (folder / SUMMARY_FILE).write_text(json.dumps(content, indent=2, ensure_ascii=False), encoding="utf-8")


def load_trigger(folder: str | os.PathLike[str]) -> Trigger:
    """Load a trigger written by [`Trigger.save_pretrained`].

    Raises:
        ValueError: If the folder holds no trigger, an unknown kind, or damaged files.
    """
    from .patch import PatchTrigger
    from .text import TextTrigger

    folder = Path(folder)
    try:
        content = json.loads((folder / SUMMARY_FILE).read_text(encoding="utf-8"))
        kind, fields = content["kind"], content.get("fields", {})
        tensors = load_file(folder / TENSOR_FILE)
    except (
        OSError,
        json.JSONDecodeError,
        UnicodeDecodeError,
        KeyError,
        TypeError,
        AttributeError,
        SafetensorError,
    ) as error:
        raise ValueError(f"`{folder}` holds no readable trigger ({error!r}).") from error
    kinds = {PatchTrigger.kind: PatchTrigger, TextTrigger.kind: TextTrigger}
    if kind not in kinds:
        raise ValueError(f"`{folder}` holds a trigger of kind {kind!r}; this version knows {', '.join(kinds)}.")
    return kinds[kind].from_parts(tensors, fields)
