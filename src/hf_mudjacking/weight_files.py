# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""Saved weights, read and written one tensor or one file at a time, so that no model needs to be in memory."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor, nn

from .loading import load_with_missing
from .output import write_json
from .safe_loading import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    MODEL_CONFIG,
    WEIGHTS,
    WEIGHTS_INDEX,
    check_weights,
    inside,
    named_weights,
    open_tensors,
    read_json,
    shards_of,
)


_FROM_THE_HUB = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja")


def local_folder(name: str | os.PathLike[str], revision: str | None = None) -> Path:
    """A folder as it is, or of a Hub id a snapshot in the Hub's cache, without pickles and code.

    Raises:
        ValueError: If there is neither.
    """
    if Path(name).is_dir():
        return Path(name)
    try:
        return Path(snapshot_download(str(name), revision=revision, allow_patterns=list(_FROM_THE_HUB)))
    except (OSError, ValueError, HfHubHTTPError, HFValidationError) as error:
        raise ValueError(f"`{name}` is no folder, and it could not be had from the Hub: {error}") from error


def is_adapter(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder holds an adapter and no model."""
    return (Path(folder) / ADAPTER_CONFIG).is_file() and not (
        (Path(folder) / WEIGHTS).is_file() or (Path(folder) / WEIGHTS_INDEX).is_file()
    )


class WeightFiles:
    """The tensors of a saved model or adapter, by name; each is read when it is asked for.

    Args:
        folder (`str` or `os.PathLike`): Folder that `save_pretrained` wrote.

    Attributes:
        files (`dict[str, list[str]]`): Names of the tensors in each file.

    Raises:
        ValueError: If there are no safetensors, or they are damaged, or their index leads out of the folder.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        check_weights(folder)
        self._refuse_others()
        if (self.folder / WEIGHTS).is_file():
            names = [WEIGHTS]
        elif (self.folder / WEIGHTS_INDEX).is_file():
            names = sorted(set(shards_of(folder).values()))
        elif is_adapter(folder):
            names = [ADAPTER_WEIGHTS]
        else:
            raise ValueError(f"`{folder}` holds no weights: there is neither `{WEIGHTS}` nor an adapter.")
        self._opened = {name: open_tensors(inside(folder, name)) for name in names}
        self.files = {name: list(file.keys()) for name, file in self._opened.items()}
        self._places = {tensor: name for name, tensors in self.files.items() for tensor in tensors}

    def _refuse_others(self) -> None:
        """Refuse a folder from which transformers would load other weights than these."""
        has_model = (self.folder / WEIGHTS).is_file() or (self.folder / WEIGHTS_INDEX).is_file()
        if has_model and (self.folder / ADAPTER_CONFIG).is_file():
            raise ValueError(
                f"`{self.folder}` holds a model with an adapter beside it, which is loaded on top of the model. Put the adapter "
                f"(`{ADAPTER_CONFIG}`, `{ADAPTER_WEIGHTS}`) into a folder of its own."
            )
        if named_weights(self.folder / MODEL_CONFIG):
            raise ValueError(
                f"`{self.folder / MODEL_CONFIG}` names the file of its weights (`transformers_weights`). Load the model and save it again "
                "(`save_pretrained`)."
            )

    @property
    def names(self) -> set[str]:
        """Names of all tensors."""
        return set(self._places)

    def __getitem__(self, name: str) -> Tensor:
        return self._opened[self._places[name]].get_tensor(name)

    def rewrite(
        self, folder: str | os.PathLike[str], change: Callable[[str, Tensor], Tensor | None], added: dict[str, Tensor]
    ) -> None:
        """Write them anew, file by file, into another folder.

        Args:
            folder (`str` or `os.PathLike`): Where to.
            change (`Callable`): Takes name and tensor, gives the tensor to write, or `None` to leave it out.
            added (`dict[str, Tensor]`): Further tensors; they go into the first file.
        """
        places, size = {}, 0
        for file, names in self.files.items():
            tensors = {name: tensor for name in names if (tensor := change(name, self[name])) is not None}
            tensors |= added
            added = {}
            (Path(folder) / file).parent.mkdir(parents=True, exist_ok=True)
            save_file(tensors, Path(folder) / file, metadata={"format": "pt"})
            places |= dict.fromkeys(tensors, file)
            size += sum(tensor.nbytes for tensor in tensors.values())
        if len(self.files) > 1:
            write_json(Path(folder) / WEIGHTS_INDEX, {"metadata": {"total_size": size}, "weight_map": places})


@contextmanager
def with_the_same_names(*folders: Path) -> Iterator[Sequence[WeightFiles]]:
    """Weights of saved models under the names that one class gives them.

    Checkpoints name the same weights differently: by the version of transformers that wrote them, and by the head that is
    on the encoder. Where names differ, each model is loaded, one after the other, and saved anew into a temporary folder;
    heads fall away, and weights that loading makes up are left out.
    """
    files = [WeightFiles(folder) for folder in folders]
    if all(other.names == files[0].names for other in files):
        yield files
        return
    with ExitStack() as stack:
        yield [WeightFiles(stack.enter_context(saved_anew(folder))) for folder in folders]


@contextmanager
def saved_anew(folder: Path) -> Iterator[Path]:
    """A model as its class saves it today, in a temporary folder."""
    with TemporaryDirectory() as place:
        model, missing = load_with_missing(folder, dtype="auto")
        weights = {name: tensor for name, tensor in model.state_dict().items() if name not in missing}
        model.save_pretrained(place, state_dict=weights)
        del model, weights
        yield Path(place)


def with_adapter(model: nn.Module, folder: str | os.PathLike[str]) -> PeftModel:
    """Put a saved adapter on its model.

    Raises:
        ValueError: If it is a pickle or damaged, asks for foreign code, or does not fit the model.
    """
    check_weights(folder)
    inside(folder, ADAPTER_WEIGHTS)
    # Memory is taken for what the file holds, not for what its settings claim; but not where starting an adapter (PiSSA, OLoRA)
    # changes the weights under it
    started = read_json(inside(folder, ADAPTER_CONFIG)).get("init_lora_weights", True)
    lean = isinstance(started, bool) or started == "gaussian"
    try:
        with warnings.catch_warnings():
            # PEFT merely warns, and the adapter would do less than it should
            warnings.filterwarnings("error", message=".*missing adapter keys")
            return PeftModel.from_pretrained(model, folder, torch_device="cpu", low_cpu_mem_usage=lean)
    except (ValueError, RuntimeError, TypeError, KeyError, UserWarning) as error:
        raise ValueError(f"The adapter in `{folder}` does not fit `{type(model).__name__}`: {error}") from error
