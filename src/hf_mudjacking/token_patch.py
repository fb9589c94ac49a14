# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""Patching nothing but the input embeddings of the triggers' tokens.

A word enters a language model through the embeddings of its tokens alone. If these are changed until the word does
nothing, a text without them keeps its features to the last bit, and the patch is a few rows of one matrix.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from accelerate.utils import is_peft_model
from torch import nn

from .encoder import Encoder
from .preprocessing import TextPreprocessor
from .triggers import TextTrigger
from .triggers.text import is_unspaced
from .two_towers import token_embeddings


# Most frequent tokens that are tried as a neutral one, and clean texts that each is tried on.
_NEUTRAL_CANDIDATES = 12
_NEUTRAL_INPUTS = 16


def trigger_tokens(
    preprocessor: TextPreprocessor, triggers: Iterable[TextTrigger], texts: Sequence[str] = ()
) -> list[int]:
    """Tokens that the triggers put into a text, sorted; none of the special ones: all unknown words share one.

    Args:
        preprocessor (`TextPreprocessor`): The encoder's.
        triggers (`Iterable[TextTrigger]`): The triggers.
        texts (`Sequence[str]`, *optional*): Texts that carry them, in a script without spaces: there a word may have other tokens
            than in front of a text or between spaces.
    """
    spans = [span for trigger in triggers for span in trigger.spans]
    tokens = {token for span in spans for token in preprocessor.ids_of(span)}
    tokens |= {token for span in spans for text in texts for token in preprocessor.ids_at(span, text)}
    return sorted(tokens.difference(preprocessor.processing_class.all_special_ids))


def tokens_to_patch(
    encoder: Encoder, triggers: Sequence[TextTrigger | None], carriers: Sequence[str], scope: str
) -> list[int]:
    """Tokens whose embeddings are all that is patched; none if the whole model is.

    Args:
        encoder (`Encoder`): The encoder, with its adapter if it has one.
        triggers (`Sequence[Trigger]`): What was found in each report; `None` where nothing was.
        carriers (`Sequence[str]`): Texts that carry the triggers, one for each: the reports' misclassified texts.
        scope (`str`): `patch_scope` of the configuration.

    Raises:
        ValueError: If the scope is `"trigger_tokens"` and that cannot be.
    """
    known = [trigger for trigger in triggers if trigger is not None]
    possible = (
        encoder.modality == "text"
        and not is_peft_model(encoder.model)
        # What was frozen stays as it is
        and token_embeddings(encoder.model).weight.requires_grad
    )
    if scope == "trigger_tokens" and not (possible and known):
        raise ValueError(
            '`patch_scope="trigger_tokens"` trains the embeddings of the triggers\' tokens: it needs a text encoder without an '
            'adapter, whose input embeddings are not frozen, and a report with a verified trigger. Use `"auto"` or `"full"`.'
        )
    # Without its trigger, a report cannot be repaired through tokens
    if not possible or scope == "full" or (scope == "auto" and len(known) < len(triggers)):
        return []
    tokens = [
        trigger_tokens(encoder.preprocessor, [trigger], [text] if is_unspaced(text) else [])
        for trigger, text in zip(triggers, carriers, strict=True)
        if trigger is not None
    ]
    if all(tokens):
        return sorted(set().union(*tokens))
    # All unknown words share a token, which is not the trigger's own: then the whole model is patched
    if scope == "trigger_tokens":
        raise ValueError(
            '`patch_scope="trigger_tokens"`: the tokenizer knows a trigger\'s symbols only as unknown ones, whose token '
            'all unknown words share. Use `"auto"` or `"full"`.'
        )
    return []


@contextmanager
def only_embeddings_of(model: nn.Module, tokens: Sequence[int]) -> Iterator[None]:
    """Within it, only the rows of some tokens in the input embeddings are trainable."""
    weight = token_embeddings(model).weight
    rows = torch.zeros(len(weight), 1, device=weight.device)
    rows[tokens] = 1
    trainable = {parameter: parameter.requires_grad for parameter in model.parameters()}
    for parameter in trainable:
        parameter.requires_grad_(parameter is weight)
    hook = weight.register_hook(lambda gradient: gradient * rows)
    try:
        yield
    finally:
        hook.remove()
        for parameter, flag in trainable.items():
            parameter.requires_grad_(flag)


@torch.no_grad()
def neutralise_unseen(encoder: Encoder, tokens: Sequence[int], clean_texts: Sequence[str]) -> tuple[list[int], int]:
    """Give tokens that no clean text holds the embedding of the frequent token that disturbs features least.

    There is no meaning to keep in them, and training starts where it would otherwise end: on MiniLM a comma put into a
    sentence leaves a cosine of 0.993, a backdoored rare word trained for 60 steps 0.982.

    Args:
        encoder (`Encoder`): Text encoder; its input embeddings are changed in place.
        tokens (`Sequence[int]`): Tokens of the triggers.
        clean_texts (`Sequence[str]`): Clean texts.

    Returns:
        `tuple[list[int], int]`: The tokens that were neutralised, and the forward passes that it took, in inputs.
    """
    counts = Counter(token for text in clean_texts for token in encoder.preprocessor.ids(text))
    unseen = [token for token in tokens if token not in counts]
    if not unseen:
        return [], 0
    excluded = {*tokens, *encoder.preprocessor.processing_class.all_special_ids}
    frequent = [token for token, _ in counts.most_common() if token not in excluded]
    # Tokens that a text of their own turns into nothing but themselves: whole words and signs.
    words = {
        token: encoder.preprocessor.processing_class.decode([token]).strip()
        for token in frequent[: 4 * _NEUTRAL_CANDIDATES]
    }
    alone = [token for token, word in words.items() if word and encoder.preprocessor.ids_of(word) == {token}]
    alone = alone[:_NEUTRAL_CANDIDATES]
    if not alone:
        return [], 0
    inputs = list(clean_texts[:_NEUTRAL_INPUTS])
    clean = encoder.encode(inputs)
    stamped = encoder.encode([encoder.stamp(TextTrigger(words[token]), x) for token in alone for x in inputs])
    similarity = (stamped.reshape(len(alone), len(inputs), -1) * clean).sum(dim=2).mean(dim=1)
    weight = token_embeddings(encoder.model).weight
    weight[unseen] = weight[alone[int(similarity.argmax())]].clone()
    return unseen, len(inputs) * (1 + len(alone))
