# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""One way to get features from any AutoModel family.

Everything that differs between model families is decided here, by looking at what the model returns, never by its name.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from accelerate import PartialState
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import normalize
from tqdm.auto import tqdm
from transformers import AutoImageProcessor, AutoModel, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer


FeatureSource = Literal["auto", "cls", "mean", "pooler", "projection"]

# Names that transformers gives the learned class token of a vision model: ViT-like families and the CLIP-like ones.
_CLASS_TOKEN_NAMES = ("cls_token", "class_embedding")


def load_model(model: str | os.PathLike[str] | PreTrainedModel | nn.Module, **kwargs: Any) -> nn.Module:
    """Load an encoder in float32, or hand back a model that is loaded already.

    Args:
        model (`str`, `os.PathLike`, [`~transformers.PreTrainedModel`] or `PeftModel`): Hub id, local folder, or model.
        kwargs: Passed to `AutoModel.from_pretrained` (`revision`, `token`, ...). `trust_remote_code` stays off unless
            given. The default dtype is float32 whatever the checkpoint says: patching moves weights by less than half
            precision resolves.

    Returns:
        `torch.nn.Module`: The encoder.

    Raises:
        ValueError: If nothing loadable is found under the name.
    """
    if isinstance(model, nn.Module):
        return model
    try:
        return AutoModel.from_pretrained(model, **{"dtype": torch.float32, **kwargs})
    except (OSError, ValueError) as error:
        raise ValueError(
            f"No model could be loaded from `{model}`: {error} Pass a Hub id or a folder written by `save_pretrained`."
        ) from error


def load_processor(model: str | os.PathLike[str] | nn.Module, **kwargs: Any) -> Any:
    """Load the image processor that belongs to a model id, folder, or model loaded from one.

    Raises:
        ValueError: If none is found there.
    """
    name = getattr(model, "name_or_path", "") if isinstance(model, nn.Module) else os.fspath(model)
    try:
        if not name:
            raise OSError("the model was built in memory and has no id")
        return AutoImageProcessor.from_pretrained(name, **kwargs)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"No image processor could be loaded for `{name or type(model).__name__}` ({error}). "
            "Pass `processing_class`."
        ) from error


def freeze_norm_statistics(model: nn.Module) -> None:
    """Freeze running statistics and affine parameters of every BatchNorm layer, as the released Mudjacking code does."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
            module.requires_grad_(False)


def set_comparison_mode(model: nn.Module) -> None:
    """Switch off everything random or running (dropout, stochastic depth, BatchNorm statistics).

    The patched model is compared with itself, so both sides must be the same function. Only the flag that gradient
    checkpointing reads stays on, because transformers ignores checkpointing in evaluation mode.
    """
    model.eval()
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.training = True


def resolve_feature_source(
    model: nn.Module, outputs: Any, feature_source: FeatureSource = "auto"
) -> Literal["cls", "mean", "pooler", "projection"]:
    """Decide which output of a model is its feature, from one forward pass.

    Args:
        model (`torch.nn.Module`): The encoder.
        outputs (`ModelOutput`): What it returned for some input.
        feature_source (`str`, *optional*, defaults to `"auto"`): `"cls"` (first token), `"mean"` (mean over tokens or
            positions), `"pooler"` (`pooler_output`), `"projection"` (`image_embeds`), or `"auto"`: the projection where
            there is one, else the class token where the family has one, else the pooled output, else the mean.

    Returns:
        `str`: The source, no longer `"auto"`.

    Raises:
        ValueError: If the model has no such output, or none that could serve.
    """
    if feature_source not in get_args(FeatureSource):
        raise ValueError(
            f"`feature_source={feature_source!r}` is unknown; choose one of {', '.join(get_args(FeatureSource))}."
        )
    hidden, pooled, projected = (
        outputs.get(key) if isinstance(outputs, dict) else None
        for key in ("last_hidden_state", "pooler_output", "image_embeds")
    )
    has_class_token = any(name.rsplit(".", 1)[-1] in _CLASS_TOKEN_NAMES for name, _ in model.named_parameters())
    usable = {
        "projection": projected is not None,
        "cls": hidden is not None and hidden.dim() == 3 and (has_class_token or feature_source == "cls"),
        "pooler": pooled is not None,
        "mean": hidden is not None and hidden.dim() in (3, 4),
    }
    if feature_source == "auto":
        feature_source = next((source for source, ok in usable.items() if ok), "auto")
    if not usable.get(feature_source, False):
        found = ", ".join(outputs) if isinstance(outputs, dict) else type(outputs).__name__
        raise ValueError(
            f"`{type(model).__name__}` gives no feature for `feature_source={feature_source!r}`; its outputs are: {found}. "
            "Load the bare encoder with `AutoModel` (no classification head), or name one of "
            f"{[source for source, ok in usable.items() if ok] or 'the outputs that an encoder has'} as `feature_source`."
        )
    return feature_source


def read_features(outputs: Any, feature_source: str) -> Tensor:
    """Read the L2-normalised float32 features `(N, D)` from model outputs; differentiable."""
    if feature_source == "projection":
        features = outputs["image_embeds"]
    elif feature_source == "pooler":
        features = outputs["pooler_output"].flatten(1)
    elif feature_source == "cls":
        features = outputs["last_hidden_state"][:, 0]
    else:
        hidden = outputs["last_hidden_state"]
        features = hidden.mean(dim=1) if hidden.dim() == 3 else hidden.mean(dim=(2, 3))
    return normalize(features.float(), dim=-1)


def preprocess_images(processing_class: Any, num_channels: int, images: Sequence[Image.Image]) -> dict[str, Tensor]:
    """Turn N raw PIL images into `pixel_values`, float32 `(N, C, H, W)`, on CPU; needs no model, so workers can do it."""
    mode = "L" if num_channels == 1 else "RGB"
    images = [image if image.mode == mode else image.convert(mode) for image in images]
    return {"pixel_values": processing_class(images=images, return_tensors="pt")["pixel_values"]}


class Encoder:
    """A model, its preprocessing, and the place its features are read from.

    Args:
        model (`torch.nn.Module`): Vision encoder (`AutoModel` of any family, or a `PeftModel` around one).
        processing_class (`BaseImageProcessor`): Image processor of that model; resizing, cropping and normalisation
            are its business, inputs are raw images.
        feature_source (`str`, *optional*, defaults to `"auto"`): See [`resolve_feature_source`].

    Raises:
        ValueError: If model and processor do not fit together, no feature can be read, or features are random.
    """

    def __init__(self, model: nn.Module, processing_class: Any, feature_source: FeatureSource = "auto") -> None:
        self.model = model
        self.processing_class = processing_class
        self.num_channels = getattr(model.config, "num_channels", 3)
        if getattr(model, "main_input_name", "pixel_values") != "pixel_values":
            raise ValueError(
                f"`{type(model).__name__}` takes `{model.main_input_name}`, not images. "
                "This version repairs vision encoders; pass one (ViT, DINOv2, ConvNeXt, ResNet, ...)."
            )
        outputs = self._probe()
        self.feature_source = resolve_feature_source(model, outputs, feature_source)
        self.feature_dim = read_features(outputs, self.feature_source).shape[-1]

    @property
    def device(self) -> torch.device:
        """Device of the model's parameters."""
        return next(self.model.parameters()).device

    def preprocess(self, images: Sequence[Image.Image]) -> dict[str, Tensor]:
        """Turn N raw PIL images into the model's inputs: `pixel_values`, float32 `(N, C, H, W)`, on CPU."""
        return preprocess_images(self.processing_class, self.num_channels, images)

    def features(self, model_inputs: dict[str, Tensor], model: nn.Module | None = None) -> Tensor:
        """Differentiable features `(N, D)`, float32, L2-normalised.

        Args:
            model_inputs (`dict`): Output of [`~Encoder.preprocess`].
            model (`torch.nn.Module`, *optional*): A wrapped form of the model (DDP, compiled) to call instead.
        """
        model = self.model if model is None else model
        return read_features(model(**self._placed(model_inputs)), self.feature_source)

    @torch.no_grad()
    def encode(
        self, images: Iterable[Image.Image], batch_size: int = 64, disable_tqdm: bool = True, desc: str = "Encoding"
    ) -> Tensor:
        """Features of raw images.

        Args:
            images (`Iterable[PIL.Image.Image]`): N raw images; read lazily.
            batch_size (`int`, *optional*, defaults to 64): Images per forward pass.
            disable_tqdm (`bool`, *optional*, defaults to `True`): Whether to hide the progress bar.
            desc (`str`, *optional*, defaults to `"Encoding"`): Its label.

        Returns:
            `FloatTensor` of shape `(N, D)`: L2-normalised features on CPU; `(0, D)` for no images.

        Raises:
            ValueError: If a feature is NaN or infinite.
        """
        training = {module: module.training for module in self.model.modules()}
        set_comparison_mode(self.model)
        chunks: list[Tensor] = []
        total = len(images) if isinstance(images, Sequence) else None
        try:
            with tqdm(total=total, disable=disable_tqdm, desc=desc, unit="img") as bar:
                for batch in _batched(images, batch_size):
                    chunks.append(self.features(self.preprocess(batch)).cpu())
                    bar.update(len(batch))
        finally:
            for module, mode in training.items():
                module.training = mode
        if not chunks:
            return torch.empty(0, self.feature_dim)
        features = torch.cat(chunks)
        broken = (~torch.isfinite(features).all(dim=1)).nonzero().flatten()
        if len(broken):
            raise ValueError(
                f"The model gives NaN or infinite features for {len(broken)} of {len(features)} inputs (the first is "
                f"input {broken[0].item()}). Check the checkpoint and its dtype; load it in float32."
            )
        return features

    def unused_parameters(self) -> list[str]:
        """Names of parameters without influence on the features (an unused pooler, a mask token), by one backward pass."""
        parameters = {name: p for name, p in self.model.named_parameters() if p.is_floating_point()}
        frozen = [p for p in parameters.values() if not p.requires_grad]
        set_comparison_mode(self.model)
        try:
            for parameter in frozen:
                parameter.requires_grad_(True)
            with torch.enable_grad():
                features = self.features(self._noise_inputs())
                gradients = torch.autograd.grad(features.sum(), list(parameters.values()), allow_unused=True)
        finally:
            for parameter in frozen:
                parameter.requires_grad_(False)
        return [name for name, gradient in zip(parameters, gradients, strict=True) if gradient is None]

    def _placed(self, model_inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Inputs on the device and in the dtype of the parameters."""
        parameter = next(self.model.parameters())
        return {
            name: value.to(parameter.device, parameter.dtype if value.is_floating_point() else None)
            for name, value in model_inputs.items()
        }

    def _noise_inputs(self) -> dict[str, Tensor]:
        size = getattr(self.model.config, "image_size", 224) or 224
        height, width = (size, size) if isinstance(size, int) else size
        # Noise, not one colour: with equal patches a model that masks at random would look deterministic.
        noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
        return self._placed(self.preprocess([Image.fromarray(noise)]))

    @torch.no_grad()
    def _probe(self) -> Any:
        try:
            inputs = self._noise_inputs()
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise ValueError(
                f"`{type(self.processing_class).__name__}` did not turn an image into `pixel_values` ({error}). "
                f"Pass the image processor that belongs to `{type(self.model).__name__}`."
            ) from error
        set_comparison_mode(self.model)
        try:
            outputs, again = self.model(**inputs), self.model(**inputs)
        except (RuntimeError, ValueError) as error:
            raise ValueError(
                f"`{type(self.model).__name__}` refused inputs of shape {tuple(inputs['pixel_values'].shape)} made by "
                f"`{type(self.processing_class).__name__}` ({error}). The processor seems to belong to another model."
            ) from error
        hidden, repeated = (o.get("last_hidden_state") if isinstance(o, dict) else None for o in (outputs, again))
        if hidden is not None and not torch.equal(hidden.nan_to_num(), repeated.nan_to_num()):
            raise ValueError(
                f"`{type(self.model).__name__}` gives different features for the same image. Switch its random masking "
                "off (for ViT-MAE: `model.config.mask_ratio = 0.0` does not suffice; load the `ViTModel` of it)."
            )
        return outputs


def encode(
    model: str | os.PathLike[str] | nn.Module,
    inputs: Iterable[Image.Image],
    processing_class: Any = None,
    feature_source: FeatureSource = "auto",
    batch_size: int = 64,
) -> Tensor:
    """Features of raw inputs from any AutoModel.

    Args:
        model (`str`, `os.PathLike` or `torch.nn.Module`): Model id, folder, or model.
        inputs (`Iterable[PIL.Image.Image]`): N raw images.
        processing_class (`BaseImageProcessor`, *optional*): Loaded from the model id when absent.
        feature_source (`str`, *optional*, defaults to `"auto"`): See [`resolve_feature_source`].
        batch_size (`int`, *optional*, defaults to 64): Images per forward pass.

    Returns:
        `FloatTensor` of shape `(N, D)`: L2-normalised features on CPU.

    Raises:
        ValueError: If model, processor and feature source do not fit together, or features are not finite.
    """
    if processing_class is None:
        processing_class = load_processor(model)
    loaded = load_model(model)
    if loaded is not model:
        loaded.to(PartialState().device)
    return Encoder(loaded, processing_class, feature_source).encode(inputs, batch_size=batch_size)


def adaptable_layers(model: nn.Module, unused: Iterable[str] = ()) -> list[str]:
    """Names of the linear and plain convolution layers that an adapter can be put on.

    Args:
        model (`torch.nn.Module`): The encoder.
        unused (`Iterable[str]`, *optional*): Parameters without influence on the features; their layers are left out.
    """
    unused = set(unused)
    return [
        name
        for name, module in model.named_modules()
        if (isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1))
        and f"{name}.weight" not in unused
    ]


def _batched(items: Iterable[Any], size: int) -> Iterable[list[Any]]:
    batch: list[Any] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
