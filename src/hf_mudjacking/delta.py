# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""A patch as the difference of two models: the XOR of their bits, so that one file leads to the patch and back, exactly."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass

import torch
from safetensors.torch import save_file
from torch import Tensor

from .fingerprint import tensor_sha256
from .safe_loading import inside, open_tensors
from .weight_files import WeightFiles


DELTA_FILE = "delta.safetensors"
_FORMAT = "mudjacking-delta-1"
# Integers of each width, through which bits are seen.
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class DeltaError(ValueError):
    """A delta does not lead from one model to the other, or does not belong to the model at hand."""


@dataclass(frozen=True)
class Change:
    """What a delta says of one tensor.

    Args:
        shape (`list[int]`): Its shape.
        base (`str`, *optional*): Its dtype in the base, such as `"float16"`; `None` if it is not there.
        patched (`str`, *optional*): Its dtype in the patched model; `None` if it is not there.
        base_sha256 (`str`, *optional*): Hash of its bytes in the base.
        patched_sha256 (`str`, *optional*): Hash of its bytes in the patched model.
        sparse (`bool`): Whether only the rows that differ are stored, with their numbers.
    """

    shape: list[int]
    base: str | None
    patched: str | None
    base_sha256: str | None
    patched_sha256: str | None
    sparse: bool


def write_delta(path: str | os.PathLike[str], base: WeightFiles, patched: WeightFiles) -> dict[str, Change]:
    """Write the difference of two models into a file.

    Of each tensor that differs it holds `xor:<name>`, the XOR of both bit patterns in integers of the dtype's width: the
    whole tensor, or where fewer than half of its rows differ, these, with their numbers in `rows:<name>`. A tensor that only
    one of them has is there as it is. Where the base is in a narrower dtype it is widened first.

    Returns:
        `dict[str, Change]`: What it says of each tensor; also in the metadata of the file.

    Raises:
        DeltaError: If the models are the same, or have tensors of another shape or of dtypes that do not widen exactly.
    """
    tensors: dict[str, Tensor] = {}
    changes: dict[str, Change] = {}
    for name in sorted(base.names | patched.names):
        a = base[name] if name in base.names else None
        b = patched[name] if name in patched.names else None
        if a is not None and b is not None and a.dtype == b.dtype and torch.equal(_bits(a), _bits(b)):
            continue
        xor = _xor(name, a, b)
        both = a is not None and b is not None
        rows = xor.flatten(1).any(dim=1).nonzero().flatten() if both and xor.dim() > 1 and xor.numel() else None
        sparse = rows is not None and 2 * len(rows) < len(xor)
        tensors[f"xor:{name}"] = xor[rows].contiguous() if sparse else xor.contiguous()
        if sparse:
            tensors[f"rows:{name}"] = rows
        changes[name] = Change(list(xor.shape), *_facts(a, b), sparse)
    if not changes:
        raise DeltaError(f"`{base.folder}` and `{patched.folder}` have the same weights, so there is no delta.")
    described = json.dumps({name: asdict(change) for name, change in changes.items()})
    save_file(tensors, path, metadata={"format": _FORMAT, "tensors": described})
    return changes


class Delta:
    """A delta on disk.

    Args:
        folder (`str` or `os.PathLike`): Folder of the patch.

    Raises:
        DeltaError: If it holds no delta that this version reads.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.path = inside(folder, DELTA_FILE)
        self._file = open_tensors(self.path)
        metadata = self._file.metadata() or {}
        if metadata.get("format") != _FORMAT:
            raise DeltaError(f"`{self.path}` is of format `{metadata.get('format')}`; this version reads `{_FORMAT}`.")
        try:
            described = json.loads(metadata["tensors"])
            self.changes = {str(name): Change(**change) for name, change in described.items()}
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise DeltaError(f"`{self.path}` is damaged: it does not say what it changes ({error!r}).") from error
        self._stored = set(self._file.keys())

    def fits(self, weights: WeightFiles, back: bool = False) -> bool:
        """Whether a model has all tensors that the delta changes; `back`, whether a patched one has."""
        side = {name for name, change in self.changes.items() if (change.patched if back else change.base)}
        return side <= weights.names

    def apply(self, weights: WeightFiles, folder: str | os.PathLike[str], back: bool = False) -> None:
        """Write a model with the delta applied, or taken back, into another folder.

        Every tensor that changes is checked before and after against the hashes in the delta.

        Args:
            weights (`WeightFiles`): The base, or with `back` the patched model.
            folder (`str` or `os.PathLike`): Where to.
            back (`bool`, *optional*, defaults to `False`): Whether to go from the patched model to the base.

        Raises:
            DeltaError: If the delta does not belong to the model, or is damaged.
        """
        added = {
            name: self._other_side(name, change, None, back)
            for name, change in self.changes.items()
            if (change.patched if back else change.base) is None
        }

        def change(name: str, tensor: Tensor) -> Tensor | None:
            return self._other_side(name, self.changes[name], tensor, back) if name in self.changes else tensor

        weights.rewrite(folder, change, added)

    def _other_side(self, name: str, change: Change, tensor: Tensor | None, back: bool) -> Tensor | None:
        to_dtype, before, after = change.patched, change.base_sha256, change.patched_sha256
        if back:
            to_dtype, before, after = change.base, after, before
        if tensor is not None and (list(tensor.shape) != change.shape or tensor_sha256(tensor) != before):
            raise DeltaError(
                f"`{name}` is not the tensor that `{self.path}` was made for (sha256 "
                f"{tensor_sha256(tensor)[:16]}…, wanted {str(before)[:16]}…)."
            )
        if to_dtype is None:
            return None
        try:
            wide = getattr(torch, change.patched or change.base)
            if change.sparse and tensor is None:
                raise ValueError("only rows of it are in the file")
            xor = self._full(name, change, _BITS[wide.itemsize])
            bits = xor if tensor is None else xor ^ _bits(tensor.to(wide))
            result = bits.view(wide).to(getattr(torch, to_dtype))
        except (AttributeError, TypeError, KeyError, RuntimeError, IndexError, ValueError) as error:
            raise DeltaError(f"`{self.path}` is damaged: `{name}` cannot be rebuilt ({error!r}).") from error
        if tensor_sha256(result) != after:
            raise DeltaError(f"`{self.path}` is damaged: it does not give the `{name}` that it should.")
        return result

    def _full(self, name: str, change: Change, integer: torch.dtype) -> Tensor:
        """The XOR of a whole tensor."""
        if f"xor:{name}" not in self._stored or (change.sparse and f"rows:{name}" not in self._stored):
            raise ValueError("it is not in the file")
        xor = self._file.get_tensor(f"xor:{name}")
        if xor.dtype != integer:
            raise TypeError(f"it is stored as {xor.dtype}")
        if not change.sparse:
            return xor.reshape(change.shape).clone()
        full = torch.zeros(change.shape, dtype=integer)
        full[self._file.get_tensor(f"rows:{name}")] = xor
        return full


def _facts(a: Tensor | None, b: Tensor | None) -> tuple[str | None, str | None, str | None, str | None]:
    dtypes = (None if tensor is None else str(tensor.dtype).removeprefix("torch.") for tensor in (a, b))
    return (*dtypes, *(None if tensor is None else tensor_sha256(tensor) for tensor in (a, b)))


def _xor(name: str, a: Tensor | None, b: Tensor | None) -> Tensor:
    if a is None or b is None:
        return _bits(b if a is None else a).clone()
    wide = a.to(b.dtype)
    if a.shape != b.shape or not torch.equal(_bits(wide.to(a.dtype)), _bits(a)):
        raise DeltaError(
            f"`{name}` is {list(a.shape)} in {a.dtype} in one model and {list(b.shape)} in {b.dtype} in the other; there is a "
            "delta only between tensors of one shape, from a narrower or the same dtype."
        )
    return _bits(wide) ^ _bits(b)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(_BITS[tensor.dtype.itemsize])
