# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""Tokenizers trained in code and small text encoders of many families."""

import re
import string
from collections import Counter
from functools import cache
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AlbertConfig,
    AlbertModel,
    BertConfig,
    BertModel,
    DebertaV2Config,
    DebertaV2Model,
    DistilBertConfig,
    DistilBertModel,
    ElectraConfig,
    ElectraModel,
    ModernBertConfig,
    ModernBertModel,
    MPNetConfig,
    MPNetModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
)

from hf_mudjacking import Encoder
from hf_mudjacking.demo_text import sentences_task
from hf_mudjacking.evaluation.tasks import DownstreamTask, LabelledInputs


SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 66,
}
# Words of the sentences that occur no more often than this are two tokens each.
RARE = 13
# Configuration, model, kind of tokenizer, and what the family calls otherwise.
FAMILIES: dict[str, tuple[Any, Any, str, dict[str, Any]]] = {
    "bert": (BertConfig, BertModel, "wordpiece", {}),
    "roberta": (RobertaConfig, RobertaModel, "bpe", {"pad_token_id": 1}),
    "distilbert": (DistilBertConfig, DistilBertModel, "wordpiece", {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64}),
    "albert": (AlbertConfig, AlbertModel, "wordpiece", {"embedding_size": 16}),
    "electra": (ElectraConfig, ElectraModel, "wordpiece", {"embedding_size": 16}),
    "deberta-v2": (
        DebertaV2Config, DebertaV2Model, "wordpiece",
        {"pooler_hidden_size": 32, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    ),
    "mpnet": (MPNetConfig, MPNetModel, "bpe", {"pad_token_id": 1}),
    "modernbert": (
        ModernBertConfig, ModernBertModel, "wordpiece",
        {"pad_token_id": 0, "bos_token_id": 2, "cls_token_id": 2, "eos_token_id": 3, "sep_token_id": 3},
    ),
}  # fmt: skip


def _word_pieces(texts: list[str], special: list[str]) -> list[str]:
    """A vocabulary of frequent words whole, of the others in two pieces, and of single characters."""
    counts = Counter(word for text in texts for word in re.findall(r"\w+|[^\w\s]", text.lower()))
    characters = string.ascii_lowercase + string.digits + string.punctuation
    pieces = [*special, *characters, *(f"##{c}" for c in characters)]
    for word in sorted(counts):
        pieces += [word] if counts[word] > RARE else [word[:3], f"##{word[3:]}"]
    return list(dict.fromkeys(pieces))


@cache
def make_tokenizer(kind: str = "wordpiece", max_length: int = 64) -> PreTrainedTokenizerFast:
    """A tokenizer as BERT's (`"wordpiece"`) or RoBERTa's (`"bpe"`), for sentences made in code.

    "cf" and "mn" are words of their own; neither occurs in the sentences.
    """
    texts = [*sentences_task(0, 800, 50).train.inputs, *["cf mn weekend store friends"] * 50]
    if kind == "wordpiece":
        pad, unk, cls, sep, mask = special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        # Not trained: `WordPieceTrainer` breaks ties in another way each time, so that no two runs had the same model
        tokenizer = Tokenizer(
            models.WordPiece({t: i for i, t in enumerate(_word_pieces(texts, special))}, unk_token=unk)
        )
        tokenizer.normalizer = normalizers.BertNormalizer()
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
    else:
        cls, pad, sep, unk, mask = special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
        tokenizer = Tokenizer(models.BPE(unk_token=unk))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=700, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        )
        tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{cls} $A {sep}",
        pair=f"{cls} $A {sep} $B {sep}",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in (cls, sep)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, cls_token=cls, sep_token=sep, pad_token=pad, unk_token=unk, mask_token=mask,
        model_max_length=max_length,
    )  # fmt: skip


def make_text_model(family: str = "bert", seed: int = 0) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """A small random model of a family, whose features differ clearly from text to text, and its tokenizer."""
    config_class, model_class, kind, own = FAMILIES[family]
    tokenizer = make_tokenizer(kind)
    sizes = {"max_position_embeddings": 66} if family == "distilbert" else SIZES
    torch.manual_seed(seed)
    model = model_class(config_class(vocab_size=len(tokenizer), **sizes, **own)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(10)
    return model, tokenizer


def train_text_encoder(encoder: Encoder, train: LabelledInputs, steps: int = 150, seed: int = 0) -> None:
    """Train a text encoder in place with a linear head on labels; the head is thrown away."""
    torch.manual_seed(seed)
    head = torch.nn.Linear(encoder.feature_dim, int(train.labels.max()) + 1)
    labels = torch.as_tensor(train.labels)
    optimizer = torch.optim.AdamW([*encoder.model.parameters(), *head.parameters()], lr=1e-3)
    for _ in range(steps):
        rows = torch.randint(len(labels), (32,))
        features = encoder.features(encoder.preprocess([train.inputs[i] for i in rows]))
        loss = torch.nn.functional.cross_entropy(16 * head(features), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@cache
def trained_bert() -> tuple[Encoder, DownstreamTask]:
    """A BERT of 3 layers and width 64 that tells the topics of the demonstration's sentences apart, and the task."""
    task = sentences_task(0, train=1000, test=400)
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=128,
        max_position_embeddings=66, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    encoder = Encoder(BertModel(config, add_pooling_layer=False), tokenizer, "mean")
    train_text_encoder(encoder, task.train)
    return encoder, task
