# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""The trigger interface, and its files: tensors in safetensors, the rest in json."""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import interpolate

from ..bug_instance import to_rgb
from ..safe_loading import inside, read_json, read_tensors


TENSOR_FILE = "trigger.safetensors"
SUMMARY_FILE = "trigger.json"


class Trigger(ABC):
    """A pattern e and the way it is embedded in a raw input: x ⊕ e."""

    kind: ClassVar[str]
    modality: ClassVar[str]

    @abstractmethod
    def apply(self, x: Any) -> Any:
        """Return a copy of the raw input (PIL image or `str`) that carries the trigger."""

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self.describe()}>"

    def removed_from(self, x: Any) -> Any | None:
        """The input without the trigger, or `None` where that cannot be told: under a patch nothing is left."""
        return None

    def altered(self, rng: np.random.Generator) -> Trigger:
        """A trigger like this one, as an attacker might change it or a report leave it open; here, itself."""
        return self

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


class ImageTrigger(Trigger):
    """A trigger in raw pixels. On an image of another size it is scaled along with the image."""

    modality: ClassVar[str] = "image"
    area: float

    @property
    @abstractmethod
    def change(self) -> np.ndarray:
        """What it does, as numbers that can be compared with those of another trigger of its kind."""

    @abstractmethod
    def apply(self, x: Image.Image) -> Image.Image:
        """Stamp the trigger on a raw image of any size; the result is a new RGB image."""

    @abstractmethod
    def weakened(self, factor: float) -> ImageTrigger:
        """The same trigger at a share of its strength, above 0 up to 1; a patch becomes translucent."""

    def fields(self) -> dict[str, Any]:
        return {}

    def _levels(self, x: Any) -> np.ndarray:
        """The picture as uint8 `(H, W, 3)`, a copy."""
        if not isinstance(x, Image.Image):
            raise TypeError(f"A {self.kind} trigger is stamped on a PIL image, not on `{type(x).__name__}`.")
        return np.array(to_rgb(x))

    def _pixels(self, x: Any) -> np.ndarray:
        """The picture as float32 `(H, W, 3)`, 0 to 255."""
        return self._levels(x).astype(np.float32)

    @staticmethod
    def _picture(pixels: np.ndarray) -> Image.Image:
        return Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))


def resized(values: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """`(H, W)` or `(H, W, C)` scaled to another height and width, bilinear and without aliasing."""
    if values.shape[:2] == tuple(shape):
        return values
    planes = torch.from_numpy(np.ascontiguousarray(values.reshape(*values.shape[:2], -1))).permute(2, 0, 1)[None]
    scaled = interpolate(planes, size=tuple(shape), mode="bilinear", antialias=True, align_corners=False)
    return scaled[0].permute(1, 2, 0).numpy().reshape(*shape, *values.shape[2:])


def with_altered(trigger: Trigger, count: int, seed: int) -> list[Trigger]:
    """A trigger, and `count` altered versions of it; none where its family knows of none."""
    rng = np.random.default_rng(seed)
    altered = [trigger.altered(rng) for _ in range(count)]
    return [trigger, *(other for other in altered if other is not trigger)]


def recoloured(pattern: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A pattern `(H, W, 3)` with contrast and brightness of each channel changed, by up to a quarter of the range.

    In whole levels, uint8: as floats, a nearly black one would be taken for one from 0 to 1.
    """
    gain, offset = rng.uniform(0.75, 1.25, 3), rng.uniform(-32, 32, 3)
    return ((pattern - 127.5) * gain + 127.5 + offset).clip(0, 255).round().astype(np.uint8)


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Cosine between two arrays; of images `(H, W, C)` the second is scaled to the first. 0 if one of them is nothing."""
    if a.shape != b.shape:
        b = resized(b, a.shape[:2])
    size = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float((a * b).sum()) / size if size else 0.0


def load_trigger(folder: str | os.PathLike[str]) -> Trigger:
    """Load a trigger written by [`Trigger.save_pretrained`].

    Raises:
        ValueError: If the folder holds no trigger, an unknown kind, or damaged files.
    """
    from .additive import AdditiveTrigger
    from .blend import BlendTrigger
    from .patch import PatchTrigger
    from .text import TextTrigger
    from .warp import WarpTrigger

    try:
        content = read_json(inside(folder, SUMMARY_FILE))
        kind, fields = content.get("kind"), content.get("fields", {})
        tensors = read_tensors(inside(folder, TENSOR_FILE))
        if not (isinstance(kind, str) and isinstance(fields, dict)):
            raise ValueError(f"`{SUMMARY_FILE}` names no kind, or its `fields` are no object")
    except ValueError as error:
        raise ValueError(f"`{folder}` holds no readable trigger: {error}") from error
    families = (PatchTrigger, BlendTrigger, AdditiveTrigger, WarpTrigger, TextTrigger)
    kinds = {family.kind: family for family in families}
    if kind not in kinds:
        raise ValueError(f"`{folder}` holds a trigger of kind {kind!r}; this version knows {', '.join(kinds)}.")
    try:
        return kinds[kind].from_parts(tensors, fields)
    # Values of other types than were ever written
    except (TypeError, AttributeError, RuntimeError, IndexError) as error:
        raise ValueError(f"`{folder}` holds no readable trigger ({error!r}).") from error
