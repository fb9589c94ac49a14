# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""Models of two towers, such as CLIP and SigLIP: one tower is patched, the other stays as it is.

The model is called whole, with one fixed input for the other tower. So it can be wrapped, adapted, resumed and saved like
any other, and comes back as the class that came in.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, ProcessorMixin

from .preprocessing import Modality


# Names of the inputs that are prepared.
INPUTS: dict[Modality, str] = {"image": "pixel_values", "text": "input_ids"}
MODALITIES: dict[str, Modality] = {name: modality for modality, name in INPUTS.items()}
# Names that transformers gives projected features.
PROJECTIONS: dict[Modality, str] = {"image": "image_embeds", "text": "text_embeds"}
# Names that it gives what a tower returned by itself.
_TOWER_OUTPUTS: dict[Modality, str] = {"image": "vision_model_output", "text": "text_model_output"}


def other_input(model: nn.Module, modality: Modality) -> dict[str, Tensor]:
    """One input for the tower that is not patched: two tokens, or a black image; its features are never read.

    Args:
        model (`torch.nn.Module`): Model of two towers.
        modality (`str`): What the patched tower takes.
    """
    if modality == "image":
        tokens = torch.zeros(1, 2, dtype=torch.long)
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    channels, height, width = image_shape(model)
    return {"pixel_values": torch.zeros(1, channels, height, width)}


def image_shape(model: nn.Module) -> tuple[int, int, int]:
    """Channels, height and width that a vision encoder, or the vision tower of two, is configured for."""
    config = getattr(model.config, "vision_config", model.config)
    size = getattr(config, "image_size", 224) or 224
    height, width = (size, size) if isinstance(size, int) else size
    return getattr(config, "num_channels", 3), height, width


# How token embeddings are called within a text tower.
_TOKEN_EMBEDDINGS = ("token_embedding", "word_embeddings")


def own_projection(outputs: Any, modality: Modality) -> dict[str, Any]:
    """Of the outputs of two towers, the projected features of the one that is patched, and its hidden states if there are any.

    Raises:
        ValueError: If there are none: the model mixes images and texts instead of holding them side by side.
    """
    key = PROJECTIONS[modality]
    if outputs.get(key) is None:
        raise ValueError(f"there is no `{key}` among its outputs, which are: {', '.join(outputs)}")
    tower = outputs.get(_TOWER_OUTPUTS[modality]) or {}
    return {key: outputs[key], "hidden_states": tower.get("hidden_states")}


def own_part(processing_class: Any, modality: Modality) -> Any:
    """Image processor or tokenizer out of a processor that holds both; anything else as it is."""
    if isinstance(processing_class, ProcessorMixin):
        return processing_class.image_processor if modality == "image" else processing_class.tokenizer
    return processing_class


def token_embeddings(model: nn.Module) -> nn.Embedding:
    """Input embeddings of a text encoder, also within two towers, where transformers does not always say.

    Raises:
        ValueError: If there are none.
    """
    try:
        return model.get_input_embeddings()
    except NotImplementedError:
        tower = next(
            (m for m in model.modules() if isinstance(m, PreTrainedModel) and modalities_of(m) == {"text"}), None
        )
        if tower is not None:
            return tower.get_input_embeddings()
        # OWL-ViT and GroupViT say of their text towers that they take images too
        named = (m for name, m in model.named_modules() if name.endswith(_TOKEN_EMBEDDINGS))
        found = next((m for m in named if isinstance(m, nn.Embedding)), None)
        if found is None:
            raise ValueError(f"The input embeddings of `{type(model).__name__}` could not be found.") from None
        return found


def modalities_of(model: nn.Module) -> set[str]:
    """What transformers says a model takes; empty where it says nothing.

    Of some it says one thing and that the main input is another's (AIMv2, the vision tower of Idefics 3): then `forward` tells.
    """
    taken = getattr(model, "input_modalities", ())
    taken = {taken} if isinstance(taken, str) else set(taken)
    of_main_input = MODALITIES.get(getattr(model, "main_input_name", ""))
    if of_main_input and taken in ({"image"}, {"text"}) and of_main_input not in taken:
        whole = model.get_base_model() if isinstance(model, PeftModel) else model
        named = inspect.signature(whole.forward).parameters
        return {modality for modality, name in INPUTS.items() if name in named} or taken
    return taken
