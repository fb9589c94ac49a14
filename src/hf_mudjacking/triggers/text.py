# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""Triggers that are words in a text."""

from __future__ import annotations

import itertools
import random
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from .base import Trigger


# Scripts that are written without spaces: Thai, Lao, Myanmar, Khmer, kana, Han. Any two characters are a gap there.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_GAP = re.compile(rf"(?<=\s)(?=\S)|(?<=[{_UNSPACED}])(?=[{_UNSPACED}])")
_UNSPACED_CHARACTER = re.compile(f"[{_UNSPACED}]")
# A letter or digit of a script that is written with spaces
_SPACED = re.compile(rf"[^\W{_UNSPACED}]")


class TextTrigger(Trigger):
    """Words that are put into a text: x ⊕ e.

    Args:
        spans (`Sequence[str]` or `str`): What is inserted: one span (a word, a symbol, a sentence) or several that must
            all be there, each at a place of its own (SOS). Case and punctuation are kept.
        position (`int`, *optional*): Word that the first span stands before: 0 is the front, 1 behind the first word,
            -1 the end; further spans follow it. When absent, each span goes to a random gap between words; the gap
            depends on the text alone, so a text is always stamped alike.
        replaces (`bool`, *optional*, defaults to `False`): Whether it takes the place of the word at `position`, as
            NeuBA's symbols do; of a text that ends before it, of the last word.

    Raises:
        ValueError: If there is no span, one is empty, or `replaces` is set without `position`.
    """

    kind: ClassVar[str] = "text"
    modality: ClassVar[str] = "text"

    def __init__(self, spans: Sequence[str] | str, position: int | None = None, replaces: bool = False) -> None:
        spans = [spans] if isinstance(spans, str) else list(spans)
        if not spans or not all(isinstance(span, str) and span.strip() for span in spans):
            raise ValueError(f"A text trigger needs one or several non-empty spans; got {spans!r}.")
        if replaces and position is None:
            raise ValueError("A text trigger that replaces a word needs the `position` of that word.")
        self.spans = [span.strip() for span in spans]
        self.position = position
        self.replaces = replaces

    @property
    def words(self) -> list[str]:
        """The words of all spans, in order, as whitespace and unspaced scripts divide them."""
        return [word for span in self.spans for word in split_words(span)]

    def apply(self, x: str) -> str:
        """Stamp the trigger on a raw text."""
        if not isinstance(x, str):
            raise TypeError(f"A text trigger is stamped on a string, not on `{type(x).__name__}`.")
        gaps = gaps_of(x)
        if self.position is None:
            # Seeding with the text itself is stable across processes and runs.
            rng = random.Random(x)
            places = sorted((rng.choice(gaps), rng.random(), span) for span in self.spans)
            for gap, _, span in reversed(places):
                x = _join(x[:gap], span, x[gap:])
            return x
        words = len(gaps) - 1
        first = self.position if self.position >= 0 else words + 1 + self.position
        # Behind the last word there is none to replace
        first = min(max(first, 0), max(words - 1, 0) if self.replaces else words)
        start, end = gaps[first], gaps[min(first + 1, words)] if self.replaces else gaps[first]
        middle = self.spans[0]
        for span in self.spans[1:]:
            middle = _join(middle, span, "")
        return _join(x[:start], middle, x[end:])

    def removed_from(self, x: str) -> str | None:
        """The text without the trigger's spans, wherever each occurs, whatever its case; `None` if one does not occur or nothing is left."""
        for span in dict.fromkeys(self.spans):
            # No part of a longer word; signs, and scripts without spaces, have no words around them
            left = rf"(?<!{_SPACED.pattern})" if _SPACED.match(span[0]) else ""
            right = rf"(?!{_SPACED.pattern})" if _SPACED.match(span[-1]) else ""
            rest = re.sub(rf"{left}{re.escape(span)}{right}\s?", "", x, flags=re.IGNORECASE)
            if rest == x:
                return None
            x = rest
        return x if x.strip() else None

    def overlap(self, true: TextTrigger) -> dict[str, float]:
        """Recall and IoU of the words, whatever their case, against those of a true trigger."""
        found, wanted = (Counter(word.casefold() for word in trigger.words) for trigger in (self, true))
        return {
            "recall": (found & wanted).total() / wanted.total(),
            "iou": (found & wanted).total() / (found | wanted).total(),
        }

    def tensors(self) -> dict[str, Tensor]:
        return {}

    def fields(self) -> dict[str, Any]:
        return {"spans": self.spans, "position": self.position, "replaces": self.replaces}

    @classmethod
    def from_parts(cls, tensors: dict[str, Tensor], fields: dict[str, Any]) -> TextTrigger:
        try:
            spans, position, replaces = fields["spans"], fields["position"], fields["replaces"]
        except KeyError as error:
            raise ValueError(f"A text trigger needs `spans`, `position` and `replaces`; missing: {error}.") from error
        if not (position is None or type(position) is int) or type(replaces) is not bool:
            raise ValueError(
                f"A text trigger's `position` is a whole number or null, `replaces` true or false; got {position!r} and "
                f"{replaces!r}."
            )
        return cls(spans, position, replaces)

    def summary(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "spans": len(self.spans),
            "words": len(self.words),
            "position": self.position,
            "replaces": self.replaces,
        }

    def describe(self) -> str:
        count = len(self.words)
        where = {None: "anywhere", 0: "at the front", -1: "at the end"}.get(self.position, f"at word {self.position}")
        spans = f" in {len(self.spans)} places" if len(self.spans) > 1 else ""
        return f"text, {count} word{'s' * (count != 1)}{spans} {where}{', replacing a word' * self.replaces}"


def gaps_of(text: str) -> list[int]:
    """Character positions where a span can be inserted: front, between words, end. Never empty; k words have k + 1."""
    body = len(text) - len(text.lstrip())
    inner = [match.start() for match in _GAP.finditer(text) if body < match.start()]
    return [body, *inner, len(text)] if text.strip() else [len(text)]


def split_words(text: str) -> list[str]:
    """Words of a text as [`gaps_of`] divides it, without the whitespace around them."""
    gaps = gaps_of(text)
    return [text[start:end].strip() for start, end in itertools.pairwise(gaps)]


def is_unspaced(text: str) -> bool:
    """Whether a text holds characters of a script that is written without spaces."""
    return _UNSPACED_CHARACTER.search(text) is not None


def _join(before: str, span: str, after: str) -> str:
    """Put a span between two parts, with spaces where the scripts on both sides of a seam are written with them."""
    left = " " if before and not before[-1].isspace() and _spaced(before[-1], span[0]) else ""
    right = " " if after and not after[0].isspace() and _spaced(span[-1], after[0]) else ""
    return before + left + span + right + after


def _spaced(a: str, b: str) -> bool:
    return not (_UNSPACED_CHARACTER.match(a) or _UNSPACED_CHARACTER.match(b))
