# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""What every file from elsewhere goes through before it is believed: json, safetensors, pictures, folders, checkpoints.

Patches, triggers and bug reports come from strangers. None of them may run code, read or write outside its own folder, or
ask for more memory than such a file needs; how large a model is, its own `config.json` says. All refusals are `ValueError`s
that name the file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from math import prod
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any

from PIL import Image
from safetensors import SafetensorError, safe_open


if TYPE_CHECKING:
    from torch import Tensor


# Records and reports are some kilobytes; the trainer state of a long run is some megabytes.
MAX_JSON_BYTES = 64 * 2**20
# The largest trigger covers a picture of four megapixels in float32, with its spread.
MAX_TRIGGER_BYTES = 256 * 2**20
# Where Pillow begins to warn; it decodes up to twice as many.
MAX_PIXELS = 89_478_485
# Formats that Pillow decodes by itself. EPS, for one, would start Ghostscript.
IMAGE_FORMATS = ("AVIF", "BMP", "GIF", "ICO", "JPEG", "JPEG2000", "PNG", "PPM", "TGA", "TIFF", "WEBP")

WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
MODEL_CONFIG = "config.json"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"

# First bytes of a zip file, which is what `torch.save` writes, and of a bare pickle.
_PICKLES = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
_PICKLED_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle")
# Kinds of adapters that consist of their own weights alone; others read tokenizers, further adapters or pickles.
ADAPTER_TYPES = ("IA3", "LOHA", "LOKR", "LORA")
# A rank that takes little memory wherever it is claimed, and how many times as high as its layer is wide one may be.
_SMALL_RANK, _RANK_PER_WIDTH = 64, 16
# Settings by which PEFT imports a module of the file's choice, reads further files, multiplies layers, or keeps as many samples of
# each weight as they say.
_FOREIGN = (
    "megatron_config",
    "corda_config",
    "lora_ga_config",
    "eva_config",
    "arrow_config",
    "layer_replication",
    "monteclora_config",
)


def inside(folder: str | os.PathLike[str], name: str) -> Path:
    """Path of a file within a folder, by a name that came with the folder.

    Links may lead anywhere within the folder. In the Hub's cache, where each file is a link, they may lead to the blobs of
    the same repository.

    Raises:
        ValueError: If the name is absolute or has `..` in it, or if it is a link that leads out of the folder.
    """
    if PurePosixPath(name).is_absolute() or PureWindowsPath(name).anchor or ".." in PureWindowsPath(name).parts:
        raise ValueError(f"`{name}` in `{folder}` leads out of the folder; nothing outside it is read.")
    root = Path(os.path.realpath(folder))
    # A part of a repository, such as a report in it, has the same blobs
    caches = [place.parent.parent for place in (root, *root.parents) if place.parent.name == "snapshots"]
    allowed = [root, *(cache / "blobs" for cache in caches)]
    path = root / name
    # `Path.resolve` raises an error of its own where links go round in circles
    target = Path(os.path.realpath(path))
    if not any(target.is_relative_to(place) for place in allowed):
        raise ValueError(
            f"`{path}` is a link to `{target}`, outside its folder; nothing outside it is read. If you trust the "
            "file, put a copy of it in the place of the link."
        )
    return path


def check_folder(folder: str | os.PathLike[str]) -> Path:
    """Refuse a folder with anything in it that is neither a file nor a folder, or leads out of it.

    Raises:
        ValueError: If there is such a thing, or no folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"There is no folder `{folder}`.")
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = inside(folder, str((Path(place) / name).relative_to(folder)))
            if not (path.is_file() or path.is_dir()):
                raise ValueError(f"`{path}` is neither a file nor a folder; it is not read.")
    return folder


def read_json(path: str | os.PathLike[str], kind: type = dict) -> Any:
    """Read a json file of up to 64 MiB.

    Args:
        path (`str` or `os.PathLike`): File.
        kind (`type`, *optional*, defaults to `dict`): What it must hold, `dict` or `list`.

    Raises:
        ValueError: If the file is missing, too large, no json in UTF-8, or holds something else.
    """
    check_size(path, MAX_JSON_BYTES)
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    # Numbers of thousands of digits give a bare `ValueError`
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"`{path}` is damaged: it could not be read as json ({error!r}).") from error
    if not isinstance(content, kind):
        raise ValueError(f"`{path}` is damaged: it holds a `{type(content).__name__}`; a `{kind.__name__}` is needed.")
    return content


def open_tensors(path: str | os.PathLike[str]) -> Any:
    """Open a safetensors file, of which nothing but the header is read yet.

    Returns:
        `safetensors.safe_open`: Gives one tensor at a time, on CPU.

    Raises:
        ValueError: If the file is missing, a pickle, cut, or its header does not fit its data.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"There is no file `{path}`.")
    with path.open("rb") as file:
        start = file.read(9)
    # The length of a header may begin like a pickle
    if start.startswith(_PICKLES) and start[8:] != b"{":
        raise ValueError(
            f"`{path}` is a pickle, which can run code when it is loaded; it was not opened. Only safetensors are read."
        )
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"`{path}` is no whole safetensors file ({error}).") from error


def read_tensors(path: str | os.PathLike[str], max_bytes: int = MAX_TRIGGER_BYTES) -> dict[str, Tensor]:
    """Read all tensors of a safetensors file.

    Args:
        path (`str` or `os.PathLike`): File.
        max_bytes (`int`, *optional*, defaults to 256 MiB): Largest size that is read.

    Raises:
        ValueError: If the file cannot be opened ([`open_tensors`]) or is too large.
    """
    check_size(path, max_bytes)
    with open_tensors(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}


def open_image(path: str | os.PathLike[str]) -> Image.Image:
    """Open a picture, of which nothing but the header is read yet.

    Raises:
        ValueError: If it has more than 89,478,485 pixels (a PNG of a megabyte can hold a picture of gigabytes), or is a
            pipe, device or folder.
        OSError: As Pillow raises it for files that are none of its own raster formats.
    """
    if Path(path).exists() and not Path(path).is_file():
        raise ValueError("it is no plain file")
    Image.init()
    # Builds of Pillow differ in what they have
    image = Image.open(path, formats=[name for name in IMAGE_FORMATS if name in Image.OPEN])
    width, height = image.size
    if width * height > MAX_PIXELS:
        image.close()
        raise ValueError(f"it claims {width}×{height} pixels; at most {MAX_PIXELS:,} are decoded")
    return image


def check_weights(folder: str | os.PathLike[str]) -> None:
    """Refuse the folder of a model or an adapter whose weights are pickles, or whose index leads out of it.

    Raises:
        ValueError: If that is so; the message says how weights are converted.
    """
    folder = Path(folder)
    adapter = (folder / ADAPTER_CONFIG).is_file()
    settings = _adapter_settings(folder / ADAPTER_CONFIG) if adapter else {}
    has_model = (folder / WEIGHTS).is_file() or (folder / WEIGHTS_INDEX).is_file()
    pickles = sorted(path.name for pattern in _PICKLED_WEIGHTS for path in folder.glob(pattern))
    if pickles and not (has_model or (folder / ADAPTER_WEIGHTS).is_file()):
        raise refused_pickle(folder, pickles[0])
    if adapter and not (folder / ADAPTER_WEIGHTS).is_file():
        raise (
            refused_pickle(folder, "adapter_model.bin")
            if pickles
            else ValueError(f"`{folder}` has an `{ADAPTER_CONFIG}` but no `{ADAPTER_WEIGHTS}`.")
        )
    if adapter:
        _check_claims(folder / ADAPTER_CONFIG, settings, folder / ADAPTER_WEIGHTS)
    if (folder / WEIGHTS_INDEX).is_file():
        shards_of(folder)
    named = named_weights(folder / MODEL_CONFIG)
    if named is not None:
        inside(folder, named)
        # transformers checks the name of the index, and not what stands in it
        if named.endswith(".index.json"):
            shards_of(folder, named)


def named_weights(config: str | os.PathLike[str]) -> str | None:
    """The file that a model's configuration names as that of its weights (`transformers_weights`); hardly any does.

    Args:
        config (`str` or `os.PathLike`): File of the configuration; it may be missing.

    Raises:
        ValueError: If the configuration is damaged, or names something else than safetensors.
    """
    named = read_json(config).get("transformers_weights") if Path(config).is_file() else None
    if named is not None and not (
        isinstance(named, str) and named.endswith((".safetensors", ".safetensors.index.json"))
    ):
        raise ValueError(
            f"`{config}` names {named!r:.80} as the file of its weights (`transformers_weights`); only safetensors are read."
        )
    return named


def refused_pickle(place: object, name: str) -> ValueError:
    """The error that refuses a model with pickled weights."""
    return ValueError(
        f"`{place}` has no safetensors, and `{name}` is a pickle, which can run code when it is loaded. It was not opened. "
        "If you trust it, convert it once, in a sandbox: `AutoModel.from_pretrained(model).save_pretrained(folder)`."
    )


def shards_of(folder: str | os.PathLike[str], name: str = WEIGHTS_INDEX) -> dict[str, str]:
    """Which file each tensor of a sharded model is in, by the model's index, a file of this name.

    Raises:
        ValueError: If the index is damaged, or names a file that is missing, outside the folder, or no safetensors.
    """
    path = Path(folder) / name
    places = read_json(path).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(place, str) for place in places.values()):
        raise ValueError(f"`{path}` is damaged: it has no `weight_map` from tensors to files.")
    for place in sorted(set(places.values())):
        inside(folder, place)
        if not place.endswith(".safetensors"):
            raise ValueError(f"`{path}` names `{place}`, which is no safetensors file.")
    return places


def check_adapter(config: str | os.PathLike[str], weights: str | os.PathLike[str]) -> None:
    """Refuse an adapter whose settings reach further than its own weights, or claim more than these hold.

    PEFT and transformers take memory for what the settings claim before they read the weights.

    Args:
        config (`str` or `os.PathLike`): File of its settings.
        weights (`str` or `os.PathLike`): File of its weights.

    Raises:
        ValueError: If that is so, or one of the files is damaged.
    """
    _check_claims(config, _adapter_settings(config), weights)


def _check_claims(
    config: str | os.PathLike[str], settings: Mapping[str, Any], weights: str | os.PathLike[str]
) -> None:
    """Refuse settings, which stand in the file `config`, that claim more than the weights hold."""
    with open_tensors(weights) as file:
        shapes = [file.get_slice(name).get_shape() for name in file.keys()]
    # One of the sides is the rank or the number of tokens, which of them depends on the kind; a kernel has more
    sides = [
        side for shape in shapes if len(shape) > 1 for side in shape if side * side <= _RANK_PER_WIDTH * prod(shape)
    ]
    largest = max(sides, default=0)
    patterns = settings.get("rank_pattern") or {}
    ranks = [settings.get("r") or 0, *(patterns.values() if isinstance(patterns, dict) else [patterns])]
    # With a high rank LoKr has whole matrices instead, no larger than the layer
    if settings["peft_type"] != "LOKR" and not all(
        type(rank) is int and rank <= max(largest, _SMALL_RANK) for rank in ranks
    ):
        raise ValueError(
            f"`{config}` claims the ranks {ranks}, but the largest that `{Path(weights).name}` could have is {largest}."
        )
    tokens = settings.get("trainable_token_indices") or []
    counts = [len(each) for each in (tokens.values() if isinstance(tokens, dict) else [tokens])]
    if max(counts, default=0) > max(largest, _SMALL_RANK):
        raise ValueError(
            f"`{config}` claims embeddings of {max(counts):,} tokens (`trainable_token_indices`), but the most that "
            f"`{Path(weights).name}` could have is {largest:,}."
        )


def foreign_setting(settings: Mapping[str, Any]) -> str | None:
    """The first setting of an adapter that reaches further than its own weights."""
    return next((name for name in _FOREIGN if settings.get(name)), None)


def _adapter_settings(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The settings of an adapter of a kind that is read, with none that is foreign."""
    settings = read_json(path)
    foreign = foreign_setting(settings)
    if foreign:
        raise ValueError(
            f"`{path}` sets `{foreign}`, by which modules or files of its choice would be loaded, or layers or weights multiplied; "
            "such adapters are refused."
        )
    if settings.get("peft_type") not in ADAPTER_TYPES:
        raise ValueError(
            f"`{path}` is of an adapter of the kind `{settings.get('peft_type')}`; only {', '.join(ADAPTER_TYPES)} are read, which "
            "consist of their own weights alone."
        )
    return settings


def check_checkpoint(folder: str | os.PathLike[str]) -> None:
    """Refuse a training checkpoint in which a pickle asks for more than a `Trainer` writes.

    Optimiser, scheduler and random state are pickles by torch, which `Trainer` loads with `weights_only=True`. They are
    disassembled here, without being run, so that a bad one is refused before anything has been loaded.

    Raises:
        ValueError: If one needs a function or class besides tensors and NumPy's arrays, or weights are pickles.
    """
    # Reports are read without either
    import torch
    from transformers.trainer_pt_utils import safe_globals

    check_weights(folder)
    for path in sorted(path for pattern in _PICKLED_WEIGHTS for path in Path(folder).rglob(pattern)):
        try:
            with safe_globals():
                asked_for = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        except Exception as error:  # whatever a damaged file makes torch's reader raise
            raise ValueError(f"`{path}` is no whole file of `torch.save` ({error}); it was not loaded.") from error
        if asked_for:
            raise ValueError(
                f"`{path}` is a pickle that asks for {', '.join(f'`{name}`' for name in sorted(asked_for)[:3])}, which no "
                "checkpoint of a `Trainer` needs. It was not loaded. Resume from a checkpoint of your own."
            )


def check_size(path: str | os.PathLike[str], max_bytes: int) -> None:
    """Refuse what is missing, no plain file, or larger than such a file ever is.

    Raises:
        ValueError: If it is one of these.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"There is no file `{path}`.")
    size = path.stat().st_size
    if size > max_bytes:
        raise ValueError(f"`{path}` has {size:,} bytes; such a file has at most {max_bytes:,}, so it was not read.")
