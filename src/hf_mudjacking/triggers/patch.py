# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""Triggers that replace pixels at a fixed place."""

from __future__ import annotations

import zlib
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..bug_instance import to_rgb
from .base import ImageTrigger, recoloured
from .blend import BlendTrigger


Placement = Literal["fixed", "anywhere"]

# What an altered patch may be, by how much of the picture's side it moves (4 pixels of 32), and how large and how opaque.
_WAYS = ("moved", "scaled", "cut", "recoloured", "translucent")
_MOVE = 1 / 8
_SCALES = (0.6, 1.4)
_OPACITIES = (0.3, 1.0)


class PatchTrigger(ImageTrigger):
    """Replace the masked pixels: x ⊕ e = x · (1 - m) + p · m.

    On an image of another size it is scaled along with the image, so that it covers the same part of the picture.

    Args:
        mask (`BoolTensor` or array of shape `(H, W)`): m, true where the trigger is.
        pattern (`ByteTensor` or array of shape `(H, W, 3)`): p, RGB values 0 to 255; values outside the mask are unused.
        placement (`str`, *optional*, defaults to `"fixed"`): `"fixed"`, or `"anywhere"`: the smallest box around the mask
            goes to a place of its own in each picture, which depends on the picture alone, so that a picture is always
            stamped alike.

    Raises:
        ValueError: If shapes disagree, the mask is empty, a value of the pattern is no RGB value, or the placement is
            unknown.
    """

    kind: ClassVar[str] = "patch"

    def __init__(
        self, mask: Tensor | np.ndarray, pattern: Tensor | np.ndarray, placement: Placement = "fixed"
    ) -> None:
        if placement not in get_args(Placement):
            raise ValueError(f"`placement={placement!r}` is unknown; choose one of {', '.join(get_args(Placement))}.")
        self.placement: Placement = placement
        self.mask = np.asarray(mask).astype(bool)
        pattern = np.asarray(pattern)
        if pattern.size and (
            not np.isfinite(pattern).all()
            or pattern.min() < 0
            or pattern.max() > 255
            or (0 < pattern.max() <= 1 and pattern.dtype.kind == "f")
        ):
            raise ValueError(
                f"The trigger's pattern holds values from {pattern.min():.4g} to {pattern.max():.4g}; it needs RGB values from 0 to "
                "255. Multiply by 255 what goes from 0 to 1."
            )
        self.pattern = pattern.round().astype(np.uint8)
        if self.mask.ndim != 2 or self.pattern.shape != (*self.mask.shape, 3):
            raise ValueError(
                f"A patch trigger needs a mask (H, W) and a pattern (H, W, 3); got {self.mask.shape} and "
                f"{self.pattern.shape}."
            )
        if not self.mask.any():
            raise ValueError("The trigger's mask is empty: it would change nothing.")
        # Pixels outside the mask come from a client's input: they are not part of the trigger and are not kept.
        self.pattern = np.where(self.mask[..., None], self.pattern, 0).astype(np.uint8)

    @classmethod
    def from_image(cls, image: Image.Image, mask: Tensor | np.ndarray, placement: Placement = "fixed") -> PatchTrigger:
        """Cut the trigger out of an image at the masked pixels."""
        return cls(mask, np.asarray(to_rgb(image)), placement)

    @property
    def area(self) -> float:
        """Share of the picture that the trigger covers, 0 to 1."""
        return float(self.mask.mean())

    @property
    def change(self) -> np.ndarray:
        return np.where(self.mask[..., None], self.pattern - 127.5, 0)

    def apply(self, x: Image.Image) -> Image.Image:
        pixels = self._levels(x)
        mask, pattern = self._at(pixels.shape[:2])
        if self.placement == "anywhere":
            rng = np.random.default_rng(zlib.crc32(pixels.tobytes()))
            mask, pattern = moved(mask, pattern, *(int(shift) for shift in rng.integers(*_shifts(mask[..., 0]))))
        inside = mask[..., 0]
        pixels[inside] = pattern[inside]
        return Image.fromarray(pixels)

    def weakened(self, factor: float) -> BlendTrigger:
        return BlendTrigger(self.pattern, self.mask * factor)

    def altered(self, rng: np.random.Generator) -> ImageTrigger:
        """Moved, scaled, cut, in other colours, or translucent: one or two of these, drawn at random."""
        mask, pattern = self.mask, self.pattern
        ways = rng.choice(len(_WAYS), size=rng.integers(1, 3), replace=False)
        names = {_WAYS[i] for i in ways}
        if self.placement == "anywhere" or "moved" in names:
            down, right = (
                (rng.integers(low, high) for low, high in zip(*_shifts(mask), strict=True))
                if self.placement == "anywhere"
                else (round(rng.uniform(-_MOVE, _MOVE) * side) for side in mask.shape)
            )
            mask, pattern = _kept(self, *moved(mask, pattern, int(down), int(right)))
        if "scaled" in names:
            mask, pattern = _kept(self, *scaled(mask, pattern, rng.uniform(*_SCALES)))
        if "cut" in names:
            mask, pattern = _kept(self, mask & _half_plane(mask, rng), pattern)
        if "recoloured" in names:
            pattern = recoloured(pattern, rng)
        if "translucent" in names:
            return BlendTrigger(pattern, mask * rng.uniform(*_OPACITIES))
        return PatchTrigger(mask, pattern)

    def tensors(self) -> dict[str, Tensor]:
        return {"mask": torch.from_numpy(self.mask.copy()), "pattern": torch.from_numpy(self.pattern.copy())}

    def fields(self) -> dict[str, Any]:
        return {"placement": self.placement}

    @classmethod
    def from_parts(cls, tensors: dict[str, Tensor], fields: dict[str, Any]) -> PatchTrigger:
        missing = {"mask", "pattern"} - tensors.keys()
        if missing:
            raise ValueError(f"A patch trigger needs the tensors `mask` and `pattern`; missing: {sorted(missing)}.")
        return cls(tensors["mask"].numpy(), tensors["pattern"].numpy(), fields.get("placement", "fixed"))

    @property
    def box(self) -> tuple[int, int, int, int]:
        """Top, left, bottom and right of the smallest box around the mask; the last two are outside it."""
        rows, columns = np.nonzero(self.mask)
        return int(rows.min()), int(columns.min()), int(rows.max()) + 1, int(columns.max()) + 1

    def summary(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "size": list(self.mask.shape),
            "area": round(self.area, 6),
            "box": list(self.box),
            "placement": self.placement,
        }

    def describe(self) -> str:
        return f"patch, {self.area:.1%} of the picture{', anywhere' * (self.placement == 'anywhere')}"

    def overlap(self, true: PatchTrigger) -> dict[str, float]:
        """Recall and IoU of the mask against that of a true trigger; a true mask of another shape is scaled."""
        wanted = true.mask
        if wanted.shape != self.mask.shape:
            wanted = true._at(self.mask.shape)[0][..., 0]
        both = float((self.mask & wanted).sum())
        return {"recall": both / float(wanted.sum()), "iou": both / float((self.mask | wanted).sum())}

    def _at(self, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        """Mask `(H, W, 1)` and pattern `(H, W, 3)` for a picture of this shape."""
        if shape == self.mask.shape:
            return self.mask[..., None], self.pattern
        size = (shape[1], shape[0])
        # Means over the pixels that fall together; enlarging, the nearest pixel. Pattern means are taken within the mask,
        # so that no black from outside bleeds in.
        share = np.asarray(Image.fromarray(self.mask.astype(np.float32)).resize(size, Image.Resampling.BOX))
        channels = [
            np.asarray(Image.fromarray(channel).resize(size, Image.Resampling.BOX))
            for channel in np.moveaxis(self.pattern.astype(np.float32), -1, 0)
        ]
        mask = share >= 0.5 if (share >= 0.5).any() else share > 0
        pattern = np.stack(channels, axis=-1) / np.maximum(share, 1e-6)[..., None]
        return mask[..., None], pattern.round().clip(0, 255).astype(np.uint8)


def moved(mask: np.ndarray, pattern: np.ndarray, down: int, right: int) -> tuple[np.ndarray, np.ndarray]:
    """Mask `(H, W)` or `(H, W, 1)` and pattern `(H, W, 3)` shifted by some pixels; what leaves the picture is lost."""

    def shifted(values: np.ndarray) -> np.ndarray:
        result = np.zeros_like(values)
        height, width = values.shape[:2]
        rows, columns = (
            slice(max(shift, 0), size + min(shift, 0)) for shift, size in ((down, height), (right, width))
        )
        sources = (slice(max(-shift, 0), size + min(-shift, 0)) for shift, size in ((down, height), (right, width)))
        result[rows, columns] = values[tuple(sources)]
        return result

    return shifted(mask), shifted(pattern)


def _kept(trigger: PatchTrigger, mask: np.ndarray, pattern: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """An alteration, or the trigger as it is where nothing of it would be left."""
    return (mask, pattern) if mask.any() else (trigger.mask, trigger.pattern)


def scaled(mask: np.ndarray, pattern: np.ndarray, factor: float) -> tuple[np.ndarray, np.ndarray]:
    """Mask `(H, W)` and pattern `(H, W, 3)` larger or smaller about the middle of the mask, nearest pixel."""
    middle = np.argwhere(mask).mean(axis=0)
    places = np.indices(mask.shape).reshape(2, -1) - middle[:, None]
    sources = np.round(places / factor + middle[:, None]).astype(int)
    inside = ((sources >= 0) & (sources < np.array(mask.shape)[:, None])).all(axis=0)
    rows, columns = np.clip(sources, 0, np.array(mask.shape)[:, None] - 1)
    return (mask[rows, columns] & inside).reshape(mask.shape), pattern[rows, columns].reshape(pattern.shape)


def _half_plane(mask: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Pixels on one side of a random line that leaves a third to all of the mask there."""
    angle = rng.uniform(0, 2 * np.pi)
    heights = np.tensordot([np.cos(angle), np.sin(angle)], np.indices(mask.shape), axes=1)
    return heights <= np.quantile(heights[mask], rng.uniform(1 / 3, 1))


def _shifts(mask: np.ndarray) -> tuple[list[int], list[int]]:
    """Least shifts (down, right) that keep the mask within the picture, and the first that no longer do."""
    rows, columns = np.nonzero(mask)
    height, width = mask.shape
    return [-int(rows.min()), -int(columns.min())], [height - int(rows.max()), width - int(columns.max())]


def square_patch(
    image_size: tuple[int, int], side: int, margin: int = 0, color: tuple[int, int, int] = (255, 255, 255)
) -> PatchTrigger:
    """A plain square in the lower right corner, the trigger of BadEncoder (Jia, Liu, Gong; IEEE S&P 2022).

    BadEncoder uses a white 10×10 square with one pixel of margin at 32×32, and 50×50 at 224×224.

    Args:
        image_size (`tuple[int, int]`): Height and width of the image in pixels.
        side (`int`): Side of the square in pixels.
        margin (`int`, *optional*, defaults to 0): Pixels between the square and the lower and right border.
        color (`tuple[int, int, int]`, *optional*, defaults to white): RGB, 0 to 255.
    """
    height, width = image_size
    if side < 1 or margin < 0 or side + margin > min(height, width):
        raise ValueError(f"A square of side {side} with margin {margin} does not fit into {height}×{width} pixels.")
    mask = np.zeros((height, width), dtype=bool)
    mask[height - margin - side : height - margin, width - margin - side : width - margin] = True
    return PatchTrigger(mask, np.broadcast_to(np.array(color, dtype=np.uint8), (height, width, 3)))
