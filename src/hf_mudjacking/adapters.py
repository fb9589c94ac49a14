# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""Adapters of PEFT around an encoder: which can be trained and saved, and where they are put."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Iterable

from accelerate.utils import is_peft_model
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .safe_loading import ADAPTER_TYPES, foreign_setting


logger = logging.getLogger(__name__)

# Ways to start an adapter that leave the weights under it as they are, or change them in the same way each time it is loaded.
_STARTS = (True, "gaussian", "pissa", "olora", "orthogonal")
# Those of them that PEFT has for linear layers alone.
_STARTS_OF_LINEAR = ("pissa", "olora", "orthogonal")
# The name that PEFT gives an adapter, unless it is told another.
_ADAPTER = "default"
# Least cosine of a feature with what it was before an adapter was put on: those that start with nothing have 1 but for rounding, and
# a random start, or one that cuts the weights short (KaSA), had 0.49 to 0.96 on a small ViT.
_SAME_START = 0.999


def adaptable_layers(model: nn.Module, unused: Iterable[str] = (), convolutions: bool = True) -> list[str]:
    """Names of the linear layers, GPT-2's `Conv1D` among them, and plain convolutions that an adapter can be put on.

    Args:
        model (`torch.nn.Module`): The encoder.
        unused (`Iterable[str]`, *optional*): Parameters without influence on the features; their layers are left out.
        convolutions (`bool`, *optional*, defaults to `True`): Whether convolutions are among them.
    """
    unused = set(unused)
    # Its output layer is never called: the weight is read, past any adapter.
    bypassed = {f"{name}.out_proj" for name, m in model.named_modules() if isinstance(m, nn.MultiheadAttention)}
    return [
        name
        for name, module in model.named_modules()
        if (
            isinstance(module, (nn.Linear, Conv1D))
            or (convolutions and isinstance(module, nn.Conv2d) and module.groups == 1)
        )
        and f"{name}.weight" not in unused
        and name not in bypassed
    ]


def check_adapters(model: nn.Module, name: str) -> None:
    """Refuse a model whose adapter could not be saved as one that loads again.

    Args:
        model (`torch.nn.Module`): The model as it was given.
        name (`str`): Its id or folder.

    Raises:
        ValueError: If an adapter was loaded or left inside the model, is of a kind that is not loaded from strangers, or has a name
            that PEFT saves elsewhere.
    """
    if isinstance(model, PreTrainedModel) and model._hf_peft_config_loaded:
        raise ValueError(
            f"`{name}` was loaded with an adapter inside it, of which `save_pretrained` would write the adapter "
            "alone. To repair the whole anew, merge the adapter first (`mudjack apply ADAPTER --to BASE`) and pass the "
            "result; to train the adapter itself, pass `PeftModel.from_pretrained(base, adapter, is_trainable=True)`."
        )
    if not is_peft_model(model):
        if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
            raise ValueError(
                f"Within `{name}` are the layers of an adapter that was put on this very object, and `save_pretrained` would write them "
                "under names that no model loads. Load the model anew, or pass the `PeftModel` to go on with the adapter."
            )
        return
    _check_kind(model.peft_config[model.active_adapters[0]], "The adapter of the model")
    if model.active_adapters != [_ADAPTER]:
        raise ValueError(
            f"The adapter of `{name}` is called {', '.join(model.active_adapters)}, and PEFT saves none but "
            f"`{_ADAPTER}` where `from_pretrained` looks. Load it under that name: `PeftModel.from_pretrained(base, folder, "
            "is_trainable=True)`."
        )


def add_adapter(model: nn.Module, peft_config: PeftConfig, name: str, unused: Iterable[str]) -> PeftModel:
    """Put a new adapter around a model; [`~hf_mudjacking.weight_files.with_adapter`] puts a saved one there.

    Args:
        model (`torch.nn.Module`): The encoder.
        peft_config (`PeftConfig`): Without `target_modules`, a `LoraConfig` gets all of [`adaptable_layers`].
        name (`str`): The model's id or folder.
        unused (`Iterable[str]`): Parameters without influence on the features.

    Raises:
        TypeError: If it is no `PeftConfig`.
        ValueError: If the model has an adapter already or no layer that one could be put on, or it is of a kind that is not loaded
            from strangers.
    """
    if not isinstance(peft_config, PeftConfig):
        raise TypeError(
            f"`peft_config` is of type `{type(peft_config).__name__}`; a `PeftConfig` is needed, such as "
            "`LoraConfig(r=4)`."
        )
    if is_peft_model(model):
        raise ValueError(
            "`model` is a `PeftModel` and `peft_config` is given too; the result could not be reloaded. Merge "
            "the adapter first (`model.merge_and_unload()`), or pass the `PeftModel` alone."
        )
    _check_kind(peft_config, "`peft_config`")
    foreign = foreign_setting(vars(peft_config))
    if foreign:
        raise ValueError(
            f"`peft_config` sets `{foreign}`, and adapters that do are not read again, as they may reach further than their own weights. "
            "Leave it out."
        )
    if isinstance(peft_config, LoraConfig):
        if peft_config.init_lora_weights not in _STARTS:
            raise ValueError(
                f"`init_lora_weights={peft_config.init_lora_weights!r}` changes the weights under the adapter by chance or by data, and "
                "differently each time it is loaded. Use the default, or one of "
                f"{', '.join(repr(start) for start in _STARTS if isinstance(start, str))}."
            )
        if peft_config.target_modules is None:
            convolutions = peft_config.init_lora_weights not in _STARTS_OF_LINEAR
            layers = adaptable_layers(model, unused, convolutions)
            if not layers:
                kinds = "no linear layer and no plain 2D convolution" if convolutions else "no linear layer"
                raise ValueError(
                    f"`{type(model).__name__}` has {kinds} that influences its features, so it is not "
                    "known where an adapter would go. Name layers in `target_modules` of `peft_config`, or patch without an adapter."
                )
            peft_config = dataclasses.replace(peft_config, target_modules=layers)
        if peft_config.use_dora:
            logger.warning(
                "`AutoModel.from_pretrained` loads an adapter of DoRA without its magnitudes. Load the patch with "
                "`PeftModel.from_pretrained(base, folder)`, or merge it (`mudjack apply`)."
            )
    adapted = get_peft_model(model, peft_config)
    if os.path.isdir(name):
        # Wherever the adapter is loaded from, this is its base
        adapted.peft_config[_ADAPTER].base_model_name_or_path = os.path.abspath(name)
    return adapted


def check_start(before: Tensor, after: Tensor, peft_config: PeftConfig) -> None:
    """Refuse an adapter that changes features before it is trained: what the patch then moves would not be told.

    Args:
        before, after (`FloatTensor` of shape `(N, D)`): Features without it and with it.
        peft_config (`PeftConfig`): Its settings.

    Raises:
        ValueError: If it does.
    """
    cosine = cosine_similarity(before.float(), after.float()).min().item()
    if cosine < _SAME_START:
        raise ValueError(
            f"With this `{type(peft_config).__name__}` features are others before any step is made (cosine {cosine:.3f} with those of "
            "the model that was given), and the repair would be judged by them. Use a start that changes nothing "
            "(`init_lora_weights=True`, `init_weights=True`), and no `kasa_config`."
        )


def _check_kind(peft_config: PeftConfig, what: str) -> None:
    if peft_config.peft_type not in ADAPTER_TYPES:
        raise ValueError(
            f"{what} is of the kind `{peft_config.peft_type!s}`, and the patch could not be applied: only "
            f"{', '.join(ADAPTER_TYPES)} are read again, which consist of their own weights alone."
        )
