# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""Models and their processors: which class loads them, and what they take."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
import transformers
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from peft import PeftConfig, PeftModel
from safetensors import SafetensorError
from torch import nn
from transformers import (
    MODEL_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedModel,
)
from transformers.utils import cached_file

from .patch_record import check_whole, read_record
from .preprocessing import Modality
from .safe_loading import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    MODEL_CONFIG,
    check_adapter,
    check_folder,
    check_weights,
    named_weights,
    read_json,
    refused_pickle,
)
from .seeding import seeded
from .two_towers import MODALITIES, modalities_of


# Of each model that was loaded here, the weights that were in no file.
_made_up: WeakKeyDictionary[nn.Module, frozenset[str]] = WeakKeyDictionary()
# Of each model that was loaded here, the parts of the checkpoint that it has no place for: a head.
_left_out: WeakKeyDictionary[nn.Module, list[str]] = WeakKeyDictionary()
_PROCESSORS = {
    "image": (AutoImageProcessor, "image processor"),
    "text": (AutoTokenizer, "tokenizer"),
    "both": (AutoProcessor, "processor"),
}
# Arguments that find a configuration too.
_OF_CONFIGS = ("revision", "token", "cache_dir", "local_files_only", "subfolder", "trust_remote_code")
# Ends of the names of models for which AutoModel would load another: a tower saved with its projection, which it leaves out; an
# encoder of two halves (T5), which it gives a decoder; the other one of DPR.
_LOADED_AS_THEY_ARE = ("ModelWithProjection", "EncoderModel", "Encoder")


def load_model(model: str | os.PathLike[str] | PreTrainedModel | nn.Module, **kwargs: Any) -> nn.Module:
    """Load an encoder in float32, or hand back a model that is loaded already.

    Args:
        model (`str`, `os.PathLike`, [`~transformers.PreTrainedModel`] or `PeftModel`): Hub id, local folder, or model.
        kwargs: Passed to `from_pretrained` (`revision`, `token`, ...). `trust_remote_code` stays off unless given. The
            default dtype is float32 whatever the checkpoint says: patching moves weights by less than half precision
            resolves. Weights are read from safetensors alone.

    Returns:
        `torch.nn.Module`: The encoder, as `AutoModel` loads it; a tower that was saved with its projection
        (`CLIPVisionModelWithProjection`, ...) keeps it, and an encoder of T5 or DPR stays one.

    Raises:
        TypeError: If it is neither a model nor the name of one.
        ValueError: If nothing loadable is found under the name, its weights are pickles, or it is a delta.
    """
    if not isinstance(model, (str, os.PathLike, nn.Module)):
        raise TypeError(f"`model` is of type `{type(model).__name__}`; pass a Hub id, a folder, or a model.")
    if not isinstance(model, nn.Module):
        return load_with_missing(model, **kwargs)[0]
    if not isinstance(model, (PreTrainedModel, PeftModel)):
        raise TypeError(
            f"`{type(model).__name__}` is no model of transformers or PEFT. Pass one, or an id or folder; of a "
            "`SentenceTransformer` its folder, or `model[0].auto_model` with its tokenizer."
        )
    return model


def load_with_missing(name: str | os.PathLike[str], **kwargs: Any) -> tuple[nn.Module, set[str]]:
    """Like [`load_model`], with the names of the weights that are in no file, and therefore made up: an unused pooler."""
    try:
        _refuse_pickles(name, kwargs)
        # What is made up is the same each time
        with seeded(0):
            model, info = class_that_loads(name, **kwargs).from_pretrained(
                name,
                output_loading_info=True,
                **{"dtype": torch.float32, "trust_remote_code": False, **kwargs, "use_safetensors": True},
            )
    # Shapes that do not fit the configuration give a `RuntimeError`
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(
            f"No model could be loaded from `{name}`: {error} {_lost_base(name) or 'Pass a Hub id or a folder written by `save_pretrained`.'}"
        ) from error
    if any("lora_magnitude_vector" in key for key in info["missing_keys"]):
        raise ValueError(
            f"`{name}` is an adapter of DoRA, which `from_pretrained` loads without its magnitudes: another model than was trained. Merge "
            f"it (`mudjack apply {name} --to BASE --output-dir NEW`) and pass the result."
        )
    _made_up[model] = frozenset(info["missing_keys"])
    _left_out[model] = sorted({name.split(".")[0] for name in info["unexpected_keys"]})
    return model, set(info["missing_keys"])


def _lost_base(name: str | os.PathLike[str]) -> str | None:
    """What helps where an adapter is there and its base, a folder, is not."""
    config = Path(name) / ADAPTER_CONFIG
    if not config.is_file():
        return None
    base = read_json(config).get("base_model_name_or_path")
    if not isinstance(base, str) or not os.path.isabs(base) or os.path.isdir(base):
        return None
    gone = f"It is an adapter of `{base}`, which is not there any more. Say where that is now:"
    if read_record(name) is None:
        return f"{gone} `base_model_name_or_path` in its `{ADAPTER_CONFIG}`."
    return f"{gone} `mudjack apply {name} --to BASE --keep-adapter --output-dir NEW`."


def made_up_weights(model: nn.Module) -> frozenset[str]:
    """Names of the weights of a model that its checkpoint lacked when it was loaded here; none of one that was loaded elsewhere."""
    return _made_up.get(model, frozenset())


def parts_left_out(model: nn.Module) -> list[str]:
    """Names of the parts of a model's checkpoint that are not in the encoder, such as `classifier`; none if it was not loaded here."""
    return _left_out.get(model, [])


def save_model(
    model: nn.Module, folder: str | os.PathLike[str], state_dict: dict[str, torch.Tensor] | None = None
) -> None:
    """`save_pretrained`, without the weights that the model's checkpoint lacked: what is made up would pass for trained."""
    made_up = made_up_weights(model)
    if made_up:
        weights = model.state_dict() if state_dict is None else state_dict
        state_dict = {name: value for name, value in weights.items() if name not in made_up}
    # Of several adapters the one that is trained
    selected = {"selected_adapters": model.active_adapters} if isinstance(model, PeftModel) else {}
    model.save_pretrained(folder, state_dict=state_dict, **selected)


def hub_commit(name: str, newest: bool) -> str | None:
    """The commit on the Hub that a model was loaded from; `None` if it was loaded from a folder, or it cannot be told.

    Models of transformers do not remember it (`config._commit_hash` is no longer set), but the cache of the Hub does.

    Args:
        name (`str`): Id or folder that the model was loaded from, or anything else that it is called.
        newest (`bool`): Whether it was loaded just now, without a revision. Otherwise one of several commits in the cache may
            be meant.
    """
    if os.path.isdir(name):
        return None
    try:
        config = try_to_load_from_cache(name, "config.json")
    except HFValidationError:
        return None
    if not isinstance(config, str):
        return None
    snapshot = Path(config).parent
    return snapshot.name if newest or len(list(snapshot.parent.iterdir())) == 1 else None


def has_two_towers(model: nn.Module) -> bool:
    """Whether a model takes images and texts side by side, as CLIP does."""
    return modalities_of(model) == {"image", "text"}


def modality_of(model: nn.Module, wanted: Modality | None = None) -> Modality:
    """Whether images or texts are what a model is repaired for.

    Args:
        model (`torch.nn.Module`): The encoder.
        wanted (`str`, *optional*): `"image"` or `"text"`: the tower that is meant, for models of two.

    Raises:
        ValueError: If the model takes neither, or both and `wanted` does not say which.
    """
    if has_two_towers(model):
        if wanted is None:
            raise ValueError(
                f"`{type(model).__name__}` takes images and texts. Say which of its towers is meant: `modality='image'` or "
                "`modality='text'`."
            )
        return wanted
    main_input = getattr(model, "main_input_name", "pixel_values")
    if main_input not in MODALITIES:
        raise ValueError(
            f"`{type(model).__name__}` takes `{main_input}`, neither images nor texts. Pass a vision or a text encoder "
            "(ViT, DINOv2, ConvNeXt, BERT, RoBERTa, ...)."
        )
    taken = modalities_of(model)
    return next((own for own in MODALITIES.values() if taken == {own}), MODALITIES[main_input])


def load_processor(name: str | os.PathLike[str] | nn.Module, model: nn.Module | None = None, **kwargs: Any) -> Any:
    """Load what prepares the inputs of a model: image processor, tokenizer or, for two towers, a processor of both.

    Args:
        name (`str`, `os.PathLike` or `torch.nn.Module`): Id or folder where it is looked for, or a model loaded from one.
        model (`torch.nn.Module`, *optional*): The model it is for; not needed when `name` is that.
        kwargs: Passed to `from_pretrained` (`revision`, `token`, ...).

    Raises:
        TypeError: If there is no model to load it for.
        ValueError: If none is found there, or a package that it needs is not installed.
    """
    model = name if model is None else model
    if not isinstance(model, nn.Module):
        raise TypeError(f"What belongs to `{name}` depends on its model; pass it too: `load_processor(name, model)`.")
    auto_class, kind = _PROCESSORS["both" if has_two_towers(model) else modality_of(model)]
    name = getattr(name, "name_or_path", "") if isinstance(name, nn.Module) else os.fspath(name)
    try:
        if not name:
            raise OSError("the model was built in memory and has no id")
        return auto_class.from_pretrained(name, **{"trust_remote_code": False, **kwargs})
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(
            f"No {kind} could be loaded for `{name or type(model).__name__}` ({error}). Pass `processing_class` (`mudjack`: `--processor`)."
        ) from error


def _refuse_pickles(name: str | os.PathLike[str], kwargs: dict[str, Any]) -> None:
    """Refuse pickled weights, also of an adapter, where transformers and PEFT would fall back to them."""
    if os.path.isdir(name):
        record = read_record(name)
        if record is not None:
            check_folder(name)
            check_whole(name, record)
            if record["kind"] == "delta":
                raise ValueError("it is a delta, no model; `mudjack apply` makes one of it.")
        check_weights(name)
        return
    shared = {key: kwargs[key] for key in _OF_CONFIGS if key in kwargs and key != "trust_remote_code"}
    shared |= {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    adapter, model = (cached_file(name, file, **shared) for file in (ADAPTER_CONFIG, MODEL_CONFIG))
    if adapter is not None:
        weights = cached_file(name, ADAPTER_WEIGHTS, **shared)
        if weights is None:
            raise refused_pickle(name, "adapter_model.bin")
        check_adapter(adapter, weights)
    if model is not None:
        named_weights(model)


def loading_class(architecture: str | None) -> Any:
    """`AutoModel`, or the class that a checkpoint names where that knows no such model (BLIP's vision tower) or would load another.

    Args:
        architecture (`str`, *optional*): Name of the class that was saved, as `config.json` has it.
    """
    if not isinstance(architecture, str):
        return AutoModel
    saved_as = getattr(transformers, architecture, None)
    if not (isinstance(saved_as, type) and issubclass(saved_as, PreTrainedModel)) or saved_as.config_class is None:
        return AutoModel
    return (
        AutoModel
        if saved_as.config_class in MODEL_MAPPING and not architecture.endswith(_LOADED_AS_THEY_ARE)
        else saved_as
    )


def class_that_loads(name: str | os.PathLike[str], **kwargs: Any) -> Any:
    """[`loading_class`] of a model, or of the base of an adapter.

    Args:
        name (`str` or `os.PathLike`): Hub id or folder.
        kwargs: As for [`load_model`].
    """
    shared = {key: kwargs[key] for key in _OF_CONFIGS if key in kwargs}
    try:
        if os.path.isfile(os.path.join(name, ADAPTER_CONFIG)):
            name = PeftConfig.from_pretrained(name).base_model_name_or_path
        architectures = AutoConfig.from_pretrained(name, **shared).architectures
    except (OSError, ValueError, TypeError):
        # What is wrong, AutoModel says better.
        return AutoModel
    return loading_class(architectures[0] if isinstance(architectures, list) and architectures else None)
