# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""One way to get features from any AutoModel family.

Everything that differs between model families is decided here, by looking at what the model returns, never by its name.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import os
from collections.abc import Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from accelerate import PartialState
from peft.tuners.tuners_utils import BaseTunerLayer
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import normalize
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from .loading import has_two_towers, hub_commit, load_model, load_processor, made_up_weights, modality_of, save_model
from .modes import comparison_mode
from .prepared_batches import prepared, prepared_ahead
from .preprocessing import ImagePreprocessor, Modality, RawInput, TextPreprocessor
from .processes import from_first, rank_and_count, summed
from .sentence_layout import SentenceLayout
from .two_towers import INPUTS, PROJECTIONS, image_shape, other_input, own_part, own_projection, token_embeddings


if TYPE_CHECKING:
    from .triggers import Trigger


FeatureSource = Literal["auto", "cls", "mean", "pooler", "projection"]

# Names that transformers gives the learned class token of a vision model: ViT-like families and the CLIP-like ones.
_CLASS_TOKEN_NAMES = ("cls_token", "class_embedding")
# Two texts of different length, so that padding is there to be seen.
_PROBE_TEXTS = ("A short text.", "This one is longer: it has a few more words than the other, and some punctuation.")
# Cosine from which two features of one text count as the same; half precision stays above it.
_SAME = 0.99
# Tokens a text is cut to where neither model nor tokenizer knows a limit.
_LONGEST_TEXT = 8192


class NonFiniteError(ValueError):
    """Features, or a loss of them, are NaN or infinite."""


def resolve_feature_source(
    model: nn.Module, outputs: Any, feature_source: FeatureSource = "auto", has_class_token: bool = False
) -> Literal["cls", "mean", "pooler", "projection"]:
    """Decide which output of a model is its feature, from one forward pass.

    Args:
        model (`torch.nn.Module`): The encoder.
        outputs (`ModelOutput`): What it returned for some inputs; those of a text encoder differ in more than their first token.
        feature_source (`str`, *optional*, defaults to `"auto"`): `"cls"` (first token), `"mean"` (mean over tokens or
            positions), `"pooler"` (`pooler_output`), `"projection"` (`image_embeds`, `text_embeds`), or `"auto"`: the
            projection where there is one, else the class token where the family has one that sees the others, else the
            pooled output, else the mean.
        has_class_token (`bool`, *optional*, defaults to `False`): Whether its tokenizer puts a class token in front.

    Returns:
        `str`: The source, no longer `"auto"`.

    Raises:
        ValueError: If the model has no such output, or none that could serve.
    """
    if feature_source not in get_args(FeatureSource):
        raise ValueError(
            f"`feature_source={feature_source!r}` is unknown; choose one of {', '.join(get_args(FeatureSource))}."
        )
    hidden, pooled, *projected = (
        outputs.get(key) if isinstance(outputs, dict) else None
        for key in ("last_hidden_state", "pooler_output", *PROJECTIONS.values())
    )
    has_class_token = has_class_token or any(_is_class_token(name) for name, _ in model.named_parameters())
    tokens = hidden is not None and hidden.dim() == 3
    # The first token of a causal model sees nothing behind it, so texts, of which there are two, have the same there
    sees_nothing = tokens and len(hidden) > 1 and bool(torch.allclose(hidden[0, 0], hidden[1, 0], atol=1e-6))
    usable = {
        "projection": any(embeddings is not None for embeddings in projected),
        "cls": tokens and not sees_nothing and (has_class_token or feature_source == "cls"),
        "pooler": pooled is not None,
        "mean": hidden is not None and hidden.dim() in (3, 4),
    }
    if feature_source == "auto":
        feature_source = next((source for source, ok in usable.items() if ok), "auto")
    if not usable.get(feature_source, False):
        found = ", ".join(outputs) if isinstance(outputs, dict) else type(outputs).__name__
        if feature_source == "cls" and sees_nothing:
            found += "; its first token sees nothing behind it and is the same for all texts"
        raise ValueError(
            f"`{type(model).__name__}` gives no feature for `feature_source={feature_source!r}`; its outputs are: {found}. "
            "Load the bare encoder with `AutoModel` (no classification head), or name one of "
            f"{[source for source, ok in usable.items() if ok] or 'the outputs that an encoder has'} as `feature_source`."
        )
    return feature_source


def _is_class_token(name: str) -> bool:
    """Whether a parameter is a class token that stands among the others; in AIMv2 the query of its pooling head is called so."""
    *modules, own = name.split(".")
    return own in _CLASS_TOKEN_NAMES and not {"head", "pooler"}.intersection(modules)


def read_features(outputs: Any, feature_source: str, attention_mask: Tensor | None = None) -> Tensor:
    """Read the L2-normalised float32 features `(N, D)` from model outputs; differentiable.

    Args:
        outputs (`ModelOutput`): What the model returned.
        feature_source (`str`): One of those that [`resolve_feature_source`] returns.
        attention_mask (`Tensor` of shape `(N, L)`, *optional*): 1 for tokens, 0 for padding, which no feature is read from.
    """
    if feature_source == "projection":
        features = next(outputs[key] for key in PROJECTIONS.values() if outputs.get(key) is not None)
    elif feature_source == "pooler":
        features = outputs["pooler_output"].flatten(1)
    else:
        hidden = outputs["last_hidden_state"]
        if attention_mask is None and feature_source == "cls":
            features = hidden[:, 0]
        elif attention_mask is None:
            features = hidden.mean(dim=1) if hidden.dim() == 3 else hidden.mean(dim=(2, 3))
        elif feature_source == "cls":
            # The first token that is none of the padding, whichever side that is on.
            features = hidden[torch.arange(len(hidden), device=hidden.device), attention_mask.argmax(dim=1)]
        else:
            # In float32: in half precision the sum over a long text overflows
            weights = attention_mask[..., None].float()
            features = (hidden.float() * weights).sum(dim=1) / weights.sum(dim=1)
    return normalize(features.float(), dim=-1)


class Encoder:
    """A model, its preprocessing, and the place its features are read from.

    Args:
        model (`torch.nn.Module`): Vision or text encoder (`AutoModel` of any family, or a `PeftModel` around one).
        processing_class (`BaseImageProcessor` or `PreTrainedTokenizerBase`): Image processor or tokenizer of that model;
            inputs are raw images or texts. For a model of two towers also the processor that holds both.
        feature_source (`str`, *optional*, defaults to `"auto"`): See [`resolve_feature_source`]. For a checkpoint of
            sentence-transformers, `"auto"` is the pooling that its files name; for two towers the projected space is
            the one that both share, and the only one that is read.
        modality (`str`, *optional*): `"image"` or `"text"`: the tower that is meant, for models of two (CLIP, SigLIP).

    Raises:
        ValueError: If model and processor do not fit together, no feature can be read, or features are random.
    """

    def __init__(
        self,
        model: nn.Module,
        processing_class: Any,
        feature_source: FeatureSource = "auto",
        modality: Modality | None = None,
    ) -> None:
        self.model = model
        self.processing_class = processing_class
        self._shares = False
        self.modality = modality_of(model, modality)
        if modality not in (None, self.modality):
            raise ValueError(
                f"`{model.name_or_path or type(model).__name__}` takes {self.modality}s, and {modality}s were given. Pass a model for "
                f"{modality}s, or {self.modality}s."
            )
        self._other_input = other_input(model, self.modality) if has_two_towers(model) else {}
        self.layout: SentenceLayout | None = None
        self.preprocessor: ImagePreprocessor | TextPreprocessor
        has_class_token = False
        if self.modality == "image":
            self.preprocessor = ImagePreprocessor(own_part(processing_class, "image"), image_shape(model)[0])
        else:
            tokenizer = own_part(processing_class, "text")
            _check_tokenizer(model, tokenizer)
            if model.name_or_path:
                revision = hub_commit(model.name_or_path, newest=False)
                self.layout = SentenceLayout.read(model.name_or_path, revision=revision)
            self.preprocessor = TextPreprocessor(
                TextPreprocessor.from_the_end(tokenizer), _max_length(model, tokenizer, self.layout)
            )
            first = tokenizer("a")["input_ids"][0]
            has_class_token = tokenizer.cls_token_id is not None and first == tokenizer.cls_token_id
            if self.layout is not None and feature_source == "auto":
                feature_source = self.layout.pooling
        outputs, mask = self._probe()
        self.feature_source = resolve_feature_source(model, outputs, feature_source, has_class_token)
        self.feature_dim = read_features(outputs, self.feature_source, mask).shape[-1]
        self._check_rows()
        if self.modality == "text" and self._sees_padding():
            self.preprocessor = dataclasses.replace(self.preprocessor, fixed_length=True)
        made_up = made_up_weights(model)
        if made_up and (used := sorted(made_up.difference(self.unused_parameters()))):
            raise ValueError(
                f"The checkpoint `{model.name_or_path}` lacks weights that features read at `{self.feature_source}` depend on "
                f"({', '.join(used[:3])}{', …' if len(used) > 3 else ''}): they would be made up. Read features elsewhere "
                "(`feature_source`), or load a checkpoint that has them."
            )

    @classmethod
    def load(
        cls,
        model: str | os.PathLike[str] | nn.Module,
        processing_class: Any = None,
        feature_source: FeatureSource = "auto",
        modality: Modality | None = None,
    ) -> Encoder:
        """An encoder of a Hub id or folder, put on the device there is, or of a model, which stays where it is.

        Args:
            model (`str`, `os.PathLike` or `torch.nn.Module`): Model id, folder, or model.
            processing_class (`BaseImageProcessor` or `PreTrainedTokenizerBase`, *optional*): Loaded from the model's id when
                absent.
            feature_source, modality: See [`Encoder`].

        Raises:
            TypeError, ValueError: If one cannot be loaded, or both do not fit together.
        """
        loaded = load_model(model)
        if processing_class is None:
            processing_class = load_processor(model, loaded)
        if loaded is not model:
            loaded.to(PartialState().device)
        return cls(loaded, processing_class, feature_source, modality)

    def with_model(self, model: nn.Module) -> Encoder:
        """The same preprocessing and reading for another model of the same architecture, such as a copy."""
        other = copy.copy(self)
        other.model = model
        return other

    def save_pretrained(self, folder: str | os.PathLike[str], state_dict: dict[str, Tensor] | None = None) -> None:
        """Write model, processing class and, if the model came in one, the layout of sentence-transformers.

        Weights that the model's checkpoint lacked, on which no feature depends, are not written either.

        Args:
            folder (`str` or `os.PathLike`): Folder to write to.
            state_dict (`dict[str, Tensor]`, *optional*): Weights instead of the model's own.
        """
        save_model(self.model, folder, state_dict)
        self.processing_class.save_pretrained(folder)
        if self.layout is not None:
            self.layout.save(folder)

    @property
    def device(self) -> torch.device:
        """Device of the model's parameters."""
        return next(self.model.parameters()).device

    def preprocess(self, inputs: Sequence[RawInput]) -> dict[str, Tensor]:
        """Turn N raw inputs into the model's, on CPU: `pixel_values` `(N, C, H, W)`, or `input_ids` `(N, L)` and the rest."""
        return self.preprocessor(inputs)

    def stamp(self, trigger: Trigger, x: RawInput) -> RawInput:
        """x ⊕ e, such that the model sees all of e: a text that fills the model's length makes room for it."""
        return self.preprocessor.stamp(trigger, x)

    def features(self, model_inputs: dict[str, Tensor], model: nn.Module | None = None) -> Tensor:
        """Differentiable features `(N, D)`, float32, L2-normalised.

        Args:
            model_inputs (`dict`): Output of [`~Encoder.preprocess`].
            model (`torch.nn.Module`, *optional*): A wrapped form of the model (DDP, compiled) to call instead.
        """
        model = self.model if model is None else model
        placed = self._placed(model_inputs)
        return read_features(self._call(model, placed), self.feature_source, placed.get("attention_mask"))

    def features_and_hidden_states(self, model_inputs: dict[str, Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """As [`~Encoder.features`], with the hidden states of all depths, the embeddings first: of each `(N, T, C)` tokens or
        `(N, C, H, W)` feature maps; of two towers, those of the one that is meant.

        Raises:
            ValueError: If the model gives none.
        """
        placed = self._placed(model_inputs)
        outputs = self._call(self.model, {**placed, "output_hidden_states": True})
        if not outputs.get("hidden_states"):
            raise ValueError(f"`{type(self.model).__name__}` gives no hidden states, which this needs.")
        features = read_features(outputs, self.feature_source, placed.get("attention_mask"))
        return features, tuple(outputs["hidden_states"])

    @contextmanager
    def over_processes(self) -> Iterator[None]:
        """Within it, the processes of a run share the work of [`~Encoder.encode`], and all get all features, bit by bit the same.

        Every process must then make the same calls with the same inputs. Without it, which is the rule, a call is the
        business of the process that makes it: one may encode while the others do not.
        """
        before, self._shares = self._shares, True
        try:
            yield
        finally:
            self._shares = before

    def agree_on(self, tensors: Iterable[Tensor]) -> None:
        """Within [`~Encoder.over_processes`], give tensors the values that they have in the first process.

        For what was found by gradients: the same computation on two devices need not end in the same bits.
        """
        if self._shares and rank_and_count()[1] > 1:
            tensors = list(tensors)
            for tensor, value in zip(tensors, from_first([tensor.detach().cpu() for tensor in tensors]), strict=True):
                tensor.data.copy_(value)

    @torch.no_grad()
    def encode(
        self,
        inputs: Iterable[RawInput],
        batch_size: int = 64,
        disable_tqdm: bool = True,
        desc: str = "Encoding",
        out: Tensor | None = None,
        num_workers: int = 0,
    ) -> Tensor:
        """Features of raw inputs.

        Args:
            inputs (`Iterable[PIL.Image.Image]` or `Iterable[str]`): N raw inputs; read lazily.
            batch_size (`int`, *optional*, defaults to 64): Inputs per forward pass.
            disable_tqdm (`bool`, *optional*, defaults to `True`): Whether to hide the progress bar.
            desc (`str`, *optional*, defaults to `"Encoding"`): Its label.
            out (`FloatTensor` of shape `(N, D)`, *optional*): Where to write them, such as a part of a mapped file.
            num_workers (`int`, *optional*, defaults to 0): Processes that read and prepare images ahead, as those of a
                `DataLoader`; `inputs` must then be a sequence. Texts need none, nor do processes that share the work.

        Returns:
            `FloatTensor` of shape `(N, D)`: L2-normalised features on CPU; `(0, D)` for no inputs.

        Raises:
            TypeError: If an input is neither an image nor a text, or not what the model takes.
            NonFiniteError: A `ValueError`, if a feature is NaN or infinite.
        """
        rank, count = rank_and_count() if self._shares else (0, 1)
        if isinstance(inputs, (str, Image.Image)):
            raise TypeError(
                f"`inputs` is a single {'text' if isinstance(inputs, str) else 'image'}; pass a list: `[x]`."
            )
        chunks: list[Tensor] = []
        done = 0
        total = len(range(rank, len(inputs), count)) if isinstance(inputs, Sized) else None
        texts, name = self.modality == "text", type(self.model).__name__
        if num_workers and not isinstance(inputs, Sized):
            raise TypeError(
                f"`inputs` is a `{type(inputs).__name__}`; workers need a sequence. Pass a list, or no workers."
            )
        if num_workers and count == 1 and not texts:
            groups = prepared_ahead(inputs, self.preprocessor, name, batch_size, num_workers)
        else:
            groups = prepared(inputs, self.preprocessor, name, batch_size, rank, count)
        bar = tqdm(total=total, disable=disable_tqdm, desc=desc, unit="text" if texts else "img")
        with bar, comparison_mode(self.model, checkpointing=False):
            for size, batches in groups:
                features = torch.zeros(size, self.feature_dim)
                for rows, model_inputs in batches:
                    features[rows] = self.features(model_inputs).cpu()
                    bar.update(len(rows))
                if out is None:
                    chunks.append(features)
                else:
                    out[done : done + size] = features
                done += size
        if out is None:
            out = torch.cat(chunks) if chunks else torch.empty(0, self.feature_dim)
        if count > 1:
            # Of a row that another process encodes there are zeros here
            out.copy_(summed(out, self.device))
        broken = [i + start for start in range(0, len(out), 4096)
                  for i in (~torch.isfinite(out[start : start + 4096]).all(dim=1)).nonzero().flatten().tolist()]  # fmt: skip
        if broken:
            raise NonFiniteError(
                f"The model gives NaN or infinite features for {len(broken)} of {len(out)} inputs (the first is "
                f"input {broken[0]}). Check the checkpoint and its dtype; load it in float32."
            )
        return out

    def unused_parameters(self, trainable_only: bool = False) -> list[str]:
        """Names of parameters without influence on the features (an unused pooler, a mask token), by one backward pass.

        Args:
            trainable_only (`bool`, *optional*, defaults to `False`): Whether to look at trainable ones alone, for whose
                gradients there is memory.
        """
        parameters = {
            name: p
            for name, p in self.model.named_parameters()
            if p.is_floating_point() and (p.requires_grad or not trainable_only)
        }
        at_rest = [p for p in parameters.values() if not p.requires_grad]
        try:
            for parameter in at_rest:
                parameter.requires_grad_(True)
            # Reentrant checkpointing gives no gradients of this kind
            with torch.enable_grad(), comparison_mode(self.model, checkpointing=False):
                features = self.features(self._probe_inputs())
                if not features.requires_grad:
                    return list(parameters)
                gradients = torch.autograd.grad(features.sum(), list(parameters.values()), allow_unused=True)
        finally:
            for parameter in at_rest:
                parameter.requires_grad_(False)
        return [name for name, gradient in zip(parameters, gradients, strict=True) if gradient is None]

    @torch.no_grad()
    def _check_rows(self) -> None:
        """Refuse a model that takes a batch for one long input (Pixtral's vision tower): there is one feature for all of it.

        Raises:
            ValueError: If there are not as many features as inputs.
        """
        inputs = {name: torch.cat([value, value]) for name, value in self._probe_inputs().items()}
        wanted = len(inputs[INPUTS[self.modality]])
        with comparison_mode(self.model, checkpointing=False):
            count = len(self.features(inputs))
        if count != wanted:
            raise ValueError(
                f"`{type(self.model).__name__}` gives {count} features for {wanted} inputs: it packs a batch into one sequence, so features "
                "cannot be told apart. Such models are not supported."
            )

    @torch.no_grad()
    def _sees_padding(self) -> bool:
        """Whether what stands behind a text, masked, reaches its features, as in SigLIP: all its texts have one length."""
        inputs = self.preprocess(_PROBE_TEXTS)
        if "attention_mask" not in inputs:
            return True
        tokens, mask = inputs["input_ids"], inputs["attention_mask"].bool()
        other = {**inputs, "input_ids": torch.where(mask, tokens, tokens[mask][1])}
        with comparison_mode(self.model, checkpointing=False):
            similarity = (self.features(inputs) * self.features(other)).sum(dim=1)
        return bool((similarity < _SAME).any())

    def _call(self, model: nn.Module, placed: dict[str, Any]) -> Any:
        """Outputs of the model; of two towers, those of the one that is meant."""
        if not self._other_input:
            return model(**placed)
        return own_projection(model(**{**self._placed(self._other_input), **placed}), self.modality)

    def _placed(self, model_inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Inputs on the device and in the dtype of the parameters."""
        parameter = next(self.model.parameters())
        return {
            name: value.to(parameter.device, parameter.dtype if value.is_floating_point() else None)
            for name, value in model_inputs.items()
        }

    def _probe_inputs(self) -> dict[str, Tensor]:
        if self.modality == "text":
            return self._placed(self.preprocess(_PROBE_TEXTS))
        return self._placed(self.preprocess([self._noise()]))

    def _noise(self) -> Image.Image:
        """Noise, not one colour: with equal patches a model that masks at random would look deterministic."""
        _, height, width = image_shape(self.model)
        return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))

    @torch.no_grad()
    def _probe(self) -> tuple[Any, Tensor | None]:
        """Outputs for an input made in code, and its attention mask."""
        name, processor = type(self.model).__name__, type(self.processing_class).__name__
        try:
            inputs = self._probe_inputs()
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            needed = "tokenizer" if self.modality == "text" else "image processor"
            raise ValueError(
                f"`{processor}` did not turn {'a text' if self.modality == 'text' else 'an image'} into "
                f"`{INPUTS[self.modality]}` ({error}). Pass the {needed} that belongs to `{name}`."
            ) from error
        try:
            with comparison_mode(self.model, checkpointing=False):
                outputs, again = self._call(self.model, inputs), self._call(self.model, inputs)
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
            shape = tuple(inputs[INPUTS[self.modality]].shape)
            raise ValueError(
                f"`{name}` refused inputs of shape {shape} made by `{processor}` ({error}). {self._why_refused()}"
            ) from error
        hidden, repeated = (o.get("last_hidden_state") if isinstance(o, dict) else None for o in (outputs, again))
        if hidden is not None and not torch.equal(hidden.nan_to_num(), repeated.nan_to_num()):
            raise ValueError(
                f"`{name}` gives different features for the same input. Switch its random masking off (for ViT-MAE: "
                "`model.config.mask_ratio = 0.0` does not suffice; load the `ViTModel` of it)."
            )
        return outputs, inputs.get("attention_mask")

    def _why_refused(self) -> str:
        """What may be the matter where a model does not take what is prepared for it."""
        if self.modality == "image":
            more = self.preprocessor.left_out([self._noise()]) & set(inspect.signature(self.model.forward).parameters)
            if more:
                return (
                    f"It takes {', '.join(f'`{each}`' for each in sorted(more))} too, and models that take more of a picture than "
                    "its pixels (SigLIP 2 in its NaFlex form) are not supported."
                )
        return "Either it belongs to another model, or the model is no encoder: then load the encoder within it."


def encode(
    model: str | os.PathLike[str] | nn.Module,
    inputs: Iterable[RawInput],
    processing_class: Any = None,
    feature_source: FeatureSource = "auto",
    batch_size: int = 64,
    modality: Modality | None = None,
) -> Tensor:
    """Features of raw inputs from any AutoModel.

    Args:
        model (`str`, `os.PathLike` or `torch.nn.Module`): Model id, folder, or model.
        inputs (`Iterable[PIL.Image.Image]` or `Iterable[str]`): N raw inputs, read lazily.
        processing_class (`BaseImageProcessor` or `PreTrainedTokenizerBase`, *optional*): Loaded from the model id when
            absent.
        feature_source (`str`, *optional*, defaults to `"auto"`): See [`resolve_feature_source`].
        batch_size (`int`, *optional*, defaults to 64): Inputs per forward pass.
        modality (`str`, *optional*): `"image"` or `"text"`, for models of two towers (CLIP, SigLIP).

    Returns:
        `FloatTensor` of shape `(N, D)`: L2-normalised features on CPU.

    Raises:
        TypeError: If an input is not of the kind that the model takes.
        ValueError: If model, processor and feature source do not fit together, or features are not finite.
    """
    return Encoder.load(model, processing_class, feature_source, modality).encode(inputs, batch_size=batch_size)


def _check_tokenizer(model: nn.Module, tokenizer: Any) -> None:
    """Refuse what is no fast tokenizer, or plainly that of another model."""
    name = type(tokenizer).__name__
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ValueError(f"`{type(model).__name__}` takes texts and `{name}` is no tokenizer. Pass its tokenizer.")
    if not tokenizer.is_fast:
        raise ValueError(
            f"`{name}` is a slow tokenizer, which does not say where in a text its tokens come from. Pass a fast one "
            "(`AutoTokenizer.from_pretrained(...)` gives it where there is one)."
        )
    if tokenizer.pad_token_id is None:
        raise ValueError(
            f"`{name}` has no padding token, so texts of different length cannot share a batch. Set one: "
            "`tokenizer.pad_token = tokenizer.eos_token`."
        )
    embeddings = token_embeddings(model)
    if isinstance(embeddings, BaseTunerLayer):
        embeddings = embeddings.get_base_layer()
    vocabulary = len(embeddings.weight)
    padding = getattr(model.config.get_text_config(), "pad_token_id", None)
    if len(tokenizer) > vocabulary:
        reason = f"it has {len(tokenizer)} tokens, the model {vocabulary}"
    elif (
        # Models that take no notice of a padding token (CLIP) name one all the same.
        embeddings.padding_idx is not None
        and padding not in (None, tokenizer.pad_token_id)
        and tokenizer.pad_token != tokenizer.eos_token
    ):
        reason = f"its padding token is {tokenizer.pad_token_id}, the model's {padding}"
    else:
        return
    raise ValueError(f"`{name}` is not the tokenizer of `{type(model).__name__}`: {reason}. Pass the model's own.")


def _max_length(model: nn.Module, tokenizer: Any, layout: SentenceLayout | None) -> int:
    """Tokens that the model takes, special ones included: the least of what checkpoint, tokenizer and positions allow."""
    lengths = [] if layout is None or layout.max_seq_length is None else [layout.max_seq_length]
    # A tokenizer that knows no limit says 1e30.
    lengths.append(tokenizer.model_max_length)
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and positions > 0:
        # RoBERTa and its kin count positions from behind the padding index.
        offset = any(
            isinstance(module, nn.Embedding)
            and name.endswith("position_embeddings")
            and module.padding_idx is not None
            for name, module in model.named_modules()
        )
        lengths.append(positions - (tokenizer.pad_token_id + 1 if offset else 0))
    return int(min(*lengths, _LONGEST_TEXT))
