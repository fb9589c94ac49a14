# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""From raw inputs to what a model takes; needs no model, so data loader workers can do it."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from PIL import Image
from torch import Tensor
from transformers import BatchFeature

from .bug_instance import to_rgb


if TYPE_CHECKING:
    from .triggers import Trigger


Modality = Literal["image", "text"]
RawInput: TypeAlias = "Image.Image | str"


@dataclass(frozen=True)
class ImagePreprocessor:
    """Turns N raw PIL images into `pixel_values`, float32 `(N, C, H, W)`, on CPU.

    Args:
        processing_class (`BaseImageProcessor`): Resizing, cropping and normalisation are its business.
        num_channels (`int`): Channels that the model takes.

    Called with pictures of which it makes different sizes, it raises a `ValueError`.
    """

    processing_class: Any
    num_channels: int

    def __call__(self, images: Sequence[Image.Image]) -> dict[str, Tensor]:
        return {"pixel_values": self._processed(images)["pixel_values"]}

    def left_out(self, images: Sequence[Image.Image]) -> set[str]:
        """Names of what the image processor gives of raw images besides `pixel_values`."""
        return set(self._processed(images)) - {"pixel_values"}

    def _processed(self, images: Sequence[Image.Image]) -> BatchFeature:
        mode = "L" if self.num_channels == 1 else "RGB"
        images = [image if image.mode == mode else to_rgb(image).convert(mode) for image in images]
        try:
            return self.processing_class(images=images, return_tensors="pt")
        # Of NumPy or PyTorch, depending on the processor
        except (ValueError, RuntimeError) as error:
            if len({image.size for image in images}) == 1:
                raise
            raise ValueError(
                f"`{type(self.processing_class).__name__}` could not make one batch of pictures of several sizes ({str(error).splitlines()[0]}) Have it give all "
                'the same: a fixed `size={"height": …, "width": …}`, or `do_center_crop=True` with a `crop_size`.'
            ) from error

    def stamp(self, trigger: Trigger, x: Image.Image) -> Image.Image:
        """x ⊕ e."""
        return trigger.apply(x)


@dataclass(frozen=True)
class TextPreprocessor:
    """Turns N raw texts into `input_ids`, `attention_mask` and what else the tokenizer gives, int64 `(N, L)`, on CPU.

    Args:
        processing_class (`PreTrainedTokenizerBase`): A fast tokenizer: the inversion needs its offsets. It pads and cuts at the
            end; see [`from_the_end`].
        max_length (`int`): Tokens that the model takes, special ones included; the rest of a text is cut off.
        fixed_length (`bool`, *optional*, defaults to `False`): Whether all texts are padded to that length, without a mask:
            for models that see their padding (SigLIP).
    """

    processing_class: Any
    max_length: int
    fixed_length: bool = False

    def __call__(self, texts: Sequence[str]) -> dict[str, Tensor]:
        encoded = self._encoded(list(texts))
        if "attention_mask" in encoded and not encoded["attention_mask"].any(dim=1).all():
            # Where a tokenizer adds nothing of its own (GPT-2), no feature could be read from an empty text
            blank = self.processing_class.eos_token or self.processing_class.pad_token
            empty = (~encoded["attention_mask"].any(dim=1)).tolist()
            encoded = self._encoded([blank if none else text for text, none in zip(texts, empty, strict=True)])
        if self.fixed_length:
            encoded.pop("attention_mask", None)
        return encoded

    def _encoded(self, texts: list[str]) -> dict[str, Tensor]:
        padding = "max_length" if self.fixed_length else "longest"
        return dict(
            self.processing_class(
                texts, padding=padding, truncation=True, max_length=self.max_length, return_tensors="pt"
            )
        )

    @staticmethod
    def from_the_end(tokenizer: Any) -> Any:
        """The tokenizer, or a copy of it that pads and cuts texts at their end.

        Padding in front would move the positions of a text, and with them its features, by the length of others in its batch.
        """
        if tokenizer.padding_side == tokenizer.truncation_side == "right":
            return tokenizer
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.padding_side = tokenizer.truncation_side = "right"
        return tokenizer

    def tokens(self, text: str) -> list[tuple[int, int, int]]:
        """Start and end in `text` of every token that the model sees, special ones left out, and the number of its word."""
        return [place for place in self.places(text) if place is not None]

    def places(self, text: str) -> list[tuple[int, int, int] | None]:
        """The same of all tokens, special ones too, for which it is `None`; an unknown word is none of those."""
        encoded = self.processing_class(
            text, truncation=True, max_length=self.max_length, return_offsets_mapping=True, verbose=False
        )
        return [
            (start, end, word) if word is not None and end > start else None
            for (start, end), word in zip(encoded["offset_mapping"], encoded.word_ids(), strict=True)
        ]

    def ids(self, text: str) -> list[int]:
        """Tokens of a text as the model sees them."""
        return self.processing_class(text, truncation=True, max_length=self.max_length, verbose=False)["input_ids"]

    def ids_of(self, span: str) -> set[int]:
        """Tokens that a span becomes at the front of a text or within it, which some tokenizers tell apart."""
        found: set[int] = set()
        for front, text in ((0, f"{span} a"), (2, f"a {span} a")):
            encoded = self.processing_class(text, add_special_tokens=False, return_offsets_mapping=True)
            found |= {
                token
                for token, (start, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
                if end > front and start < front + len(span)
            }
        return found

    def ids_at(self, span: str, text: str) -> set[int]:
        """Tokens of a span wherever it stands in a text: beside characters of a script without spaces it may have others."""
        places, ids, found = self.places(text), self.ids(text), set()
        for match in re.finditer(re.escape(span), text, re.IGNORECASE):
            found |= {
                token
                for token, place in zip(ids, places, strict=True)
                if place is not None and place[1] > match.start() and place[0] < match.end()
            }
        return found

    def visible(self, text: str, room: int = 0) -> str:
        """The part of a text that the model reads, less enough of its end to leave `room` tokens free."""
        # A token is a byte at least: short texts, nearly all, need no second look.
        if len(text.encode(errors="surrogatepass")) + room <= self.max_length - 2:
            return text
        tokens = self.tokens(text)
        spare = max(self.max_length - self.processing_class.num_special_tokens_to_add() - room, 1)
        if not tokens or (len(tokens) <= spare and tokens[-1][1] >= len(text.rstrip())):
            return text
        return text[: tokens[min(spare, len(tokens)) - 1][1]]

    def stamp(self, trigger: Trigger, x: str) -> str:
        """x ⊕ e, of which the model sees all of e: a text that fills the model's length makes room for it."""
        room = sum(len(self.tokens(span)) + 1 for span in trigger.spans)
        return trigger.apply(self.visible(x, room))
