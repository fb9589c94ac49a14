# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""Bug reports: one misclassified input and one correctly classified input of the same class."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from .safe_loading import MAX_JSON_BYTES, check_size, inside, open_image, read_json


BUG_FILE = "bug.json"
_IMAGE_FILES = ("misclassified.png", "reference.png")
# What Pillow raises for damaged files, by format and by place of the damage.
DECODING_ERRORS = (OSError, SyntaxError, ValueError, RuntimeError, MemoryError, Image.DecompressionBombError)


def to_rgb(image: Image.Image) -> Image.Image:
    """The image as 8-bit RGB. Pillow clips greyscale of 16 bits to white, and floats from 0 to 1 to black; here it keeps its contrast."""
    if image.mode.startswith(("I", "F")):
        levels = np.nan_to_num(np.asarray(image).astype(np.float64))
        most = levels.max(initial=0)
        if image.mode == "F":
            # Filters that resize go a little beyond the range
            scale = 255 if most <= 1.5 else 1 / 257 if most > 2 * 255 else 1
        else:
            scale = 1 / 257 if most > 255 else 1
        image = Image.fromarray((levels * scale).round().clip(0, 255).astype(np.uint8))
    return image.convert("RGB")


def load_image(path: str | os.PathLike[str]) -> Image.Image:
    """Read an image file completely, upright, as RGB.

    Args:
        path (`str` or `os.PathLike`): File in any raster format that Pillow decodes by itself.

    Returns:
        `PIL.Image.Image`: Decoded RGB image, rotated as its EXIF orientation says.

    Raises:
        ValueError: If the file is missing, is not an image, is damaged, or has more than 89 million pixels.
    """
    try:
        with open_image(path) as image:
            image.load()
            return to_rgb(ImageOps.exif_transpose(image))
    except FileNotFoundError as error:
        raise ValueError(f"There is no image file at `{path}`. Check the path.") from error
    except (UnidentifiedImageError, *DECODING_ERRORS) as error:
        raise ValueError(
            f"`{path}` could not be decoded as an image ({error}). Pass an undamaged PNG, JPEG or other "
            "Pillow format, no larger than the model needs it."
        ) from error


def _names_a_file(text: str) -> bool:
    """Whether a short text without a line break is the path of a file that is there."""
    return len(text) < 256 and text.isprintable() and os.path.isfile(text)


@dataclass(frozen=True)
class BugInstance:
    """One bug report: a pair of raw inputs, before any preprocessing.

    The pair is "Definition 1" of Mudjacking (Liu, Reiter, Gong; USENIX Security 2024): an input that a downstream
    classifier gets wrong and an input of the same true class that it gets right. Neither labels nor the attack need
    to be known.

    Args:
        misclassified (`PIL.Image.Image` or `str`): Input x_b that is misclassified; it may carry a trigger.
        reference (`PIL.Image.Image` or `str`): Correctly classified input x_r of the same true class, of the same kind.
        name (`str`, *optional*, defaults to `"bug"`): Name used in logs, pictures and file names.
        metadata (`dict`, *optional*): Anything worth keeping with the report; must be writable as JSON.

    Raises:
        TypeError: If the inputs are neither two images nor two texts.
        ValueError: If a text is empty, an image has no pixels or is damaged, or both inputs are the same.

    Example:

    ```python
    >>> from PIL import Image
    >>> bug = BugInstance(Image.new("RGB", (32, 32), "red"), Image.new("RGB", (32, 32), "blue"), name="report-17")
    >>> bug.modality
    'image'
    ```
    """

    misclassified: Image.Image | str
    reference: Image.Image | str
    name: str = "bug"
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        misclassified = _checked("misclassified", self.misclassified)
        reference = _checked("reference", self.reference)
        if isinstance(misclassified, str) != isinstance(reference, str):
            raise TypeError(
                f"`misclassified` is {_kind(misclassified)} and `reference` is {_kind(reference)}; a bug instance needs "
                "two inputs of one kind: two PIL images or two strings."
            )
        if isinstance(misclassified, str) and all(_names_a_file(x) for x in (misclassified, reference)):
            raise ValueError(
                f"`{misclassified}` and `{reference}` are names of files, and would be taken for texts. Read them: "
                "`BugInstance.from_files(misclassified, reference)`."
            )
        if _same(misclassified, reference):
            raise ValueError(
                "`misclassified` and `reference` are the same input. Pass as `reference` another input of the same "
                "true class that is classified correctly."
            )
        object.__setattr__(self, "misclassified", misclassified)
        object.__setattr__(self, "reference", reference)

    @property
    def modality(self) -> Literal["image", "text"]:
        """`"image"` or `"text"`."""
        return "text" if isinstance(self.misclassified, str) else "image"

    @classmethod
    def from_files(
        cls, misclassified: str | os.PathLike[str], reference: str | os.PathLike[str], **kwargs: Any
    ) -> BugInstance:
        """Build a bug instance from two image files, or from two `.txt` files.

        Raises:
            ValueError: If a file is missing or cannot be decoded, or both hold the same input.
        """
        inputs = [
            _load_text(path) if Path(path).suffix == ".txt" else load_image(path)
            for path in (misclassified, reference)
        ]
        return cls(*inputs, **kwargs)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the report as `bug.json` plus, for images, `misclassified.png` and `reference.png`.

        A new folder appears complete or not at all. Of one that holds a report these files alone are replaced, `bug.json`
        last.

        Raises:
            TypeError: If `metadata` holds what json cannot.
            ValueError: If `folder` is a file, or holds something but no bug report.
        """
        folder = Path(folder)
        if folder.is_file():
            raise ValueError(f"`{folder}` is a file; choose a folder for the report.")
        if folder.exists() and any(folder.iterdir()) and not (folder / BUG_FILE).exists():
            raise ValueError(f"`{folder}` exists and is not a bug folder (no `{BUG_FILE}`). Choose another folder.")
        folder.parent.mkdir(parents=True, exist_ok=True)
        staging = folder.parent / f".{folder.name}-{uuid.uuid4().hex}"
        staging.mkdir()
        try:
            record: dict[str, Any] = {"name": self.name, "modality": self.modality, "metadata": self.metadata}
            for role in ("misclassified", "reference"):
                value = getattr(self, role)
                if isinstance(value, str):
                    record[role] = value
                else:
                    value.save(staging / f"{role}.png")
                    record[role] = f"{role}.png"
            (staging / BUG_FILE).write_text(json.dumps(record, indent=2, ensure_ascii=False), encoding="utf-8")
            if (folder / BUG_FILE).exists():
                # What else a client put there stays
                for name in (*_IMAGE_FILES, BUG_FILE):
                    if (staging / name).exists():
                        os.replace(staging / name, folder / name)
                    else:
                        (folder / name).unlink(missing_ok=True)
            else:
                if folder.exists():
                    folder.rmdir()
                staging.rename(folder)
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> BugInstance:
        """Read a report written by [`~BugInstance.save`].

        Raises:
            ValueError: If the folder holds no readable `bug.json`, or its inputs are unusable.
        """
        path = inside(folder, BUG_FILE)
        if not path.exists():
            raise ValueError(f"`{folder}` is not a bug folder: it has no `{BUG_FILE}`.")
        record = read_json(path)
        inputs = [record.get(role) for role in ("misclassified", "reference")]
        if not all(isinstance(value, str) for value in (record.get("modality"), *inputs)):
            raise ValueError(
                f"`{path}` is damaged: it needs the keys `modality`, `misclassified` and `reference`, each with a text."
            )
        if record["modality"] not in ("image", "text"):
            raise ValueError(f"`{path}`: modality `{record['modality']}` is unknown; it is `image` or `text`.")
        if record["modality"] == "image":
            # Only the file name is used, so that a report from elsewhere cannot point outside its own folder.
            inputs = [load_image(inside(folder, Path(value).name)) for value in inputs]
        return cls(*inputs, name=str(record.get("name", "bug")), metadata=record.get("metadata", {}))


def _load_text(path: str | os.PathLike[str]) -> str:
    if not Path(path).is_file():
        raise ValueError(f"There is no text file at `{path}`. Check the path.")
    check_size(path, MAX_JSON_BYTES)
    try:
        return Path(path).read_text(encoding="utf-8-sig").rstrip("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"`{path}` could not be read as text ({error}). Save it as UTF-8.") from error


def _checked(role: str, value: Any) -> Image.Image | str:
    if isinstance(value, str):
        if not value.strip():
            raise ValueError(f"`{role}` is an empty text. Pass the text exactly as it was classified.")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"`{role}` holds half a character at position {error.start}, which no tokenizer takes: a text that was cut between the "
                "two halves of an emoji, perhaps. Pass the text as it was classified."
            ) from error
        return value
    if isinstance(value, Image.Image):
        if 0 in value.size:
            raise ValueError(f"`{role}` is an image of size {value.size}: it has no pixels.")
        try:
            return to_rgb(value)
        except DECODING_ERRORS as error:
            raise ValueError(
                f"`{role}` is an image that cannot be decoded ({error}). Pass an undamaged file."
            ) from error
    raise TypeError(
        f"`{role}` is {_kind(value)}; a bug instance needs a raw input: a `PIL.Image.Image` or a `str`. "
        "Use `BugInstance.from_files` for paths of image files."
    )


def _kind(value: Any) -> str:
    if isinstance(value, Image.Image):
        return "an image"
    return "a text" if isinstance(value, str) else f"of type `{type(value).__name__}`"


def _same(a: Image.Image | str, b: Image.Image | str) -> bool:
    if isinstance(a, str) or isinstance(b, str):
        return a == b
    return a.size == b.size and np.array_equal(np.asarray(a), np.asarray(b))
