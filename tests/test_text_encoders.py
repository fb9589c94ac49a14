# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
import copy
import json
import string

import datasets
import pytest
import torch
from peft import LoraConfig
from tokenizers import processors
from transformers import (
    AutoModel,
    BertConfig,
    BertModel,
    DPRConfig,
    DPRContextEncoder,
    GPT2Config,
    GPT2Model,
    T5Config,
    T5EncoderModel,
)
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from hf_mudjacking import BugInstance, Encoder, MudjackingTrainer, TextTrigger, encode
from hf_mudjacking.encoder import read_features
from hf_mudjacking.loading import load_model, load_processor, modality_of
from hf_mudjacking.patches import apply_patch
from hf_mudjacking.sentence_layout import SentenceLayout

from .conftest import largest_difference, make_config
from .text_models import FAMILIES, make_text_model, make_tokenizer


TEXTS = [
    "the bank rose",
    "this morning my sister told me that the team won the match , and a friend of mine was there .",
    "Once again inflation stayed high this year after all .",
]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("source", ["cls", "mean"])
def test_padding_never_changes_features(family, source):
    encoder = Encoder(*make_text_model(family), source)
    alone = torch.cat([encoder.encode([text]) for text in TEXTS])
    torch.testing.assert_close(encoder.encode(TEXTS), alone, atol=1e-5, rtol=0)
    assert (alone @ alone.T)[0, 1] < 0.99
    assert alone.shape == (3, 32)


@pytest.mark.parametrize("family", FAMILIES)
def test_features_by_hand(family):
    model, tokenizer = make_text_model(family)
    inputs = tokenizer([TEXTS[1]], return_tensors="pt")
    with torch.no_grad():
        hidden = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).last_hidden_state[0]
    for source, by_hand in (("cls", hidden[0]), ("mean", hidden.mean(dim=0))):
        feature = Encoder(model, tokenizer, source).encode([TEXTS[1]])[0]
        torch.testing.assert_close(feature, by_hand / by_hand.norm(), atol=1e-5, rtol=1e-5)
    # A class token stands in front, so that is what "auto" reads.
    assert Encoder(model, tokenizer).feature_source == "cls"


def test_left_padding_reads_the_same_tokens():
    hidden, mask = torch.randn(2, 5, 4), torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    read = read_features({"last_hidden_state": hidden}, "cls", mask)
    torch.testing.assert_close(read, torch.nn.functional.normalize(hidden[[0, 1], [2, 0]], dim=-1))


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_padding_in_front_would_move_positions(family):
    """With one that pads and cuts in front, the features of a text were other ones beside a longer text, and a trigger was cut off."""
    model, tokenizer = _gpt2() if family == "gpt2" else make_text_model(family)
    expected = Encoder(model, tokenizer, "mean").encode(TEXTS[:2])
    other = copy.deepcopy(tokenizer)
    other.padding_side = other.truncation_side = "left"
    encoder = Encoder(model, other, "mean")
    assert largest_difference({"": encoder.encode(TEXTS[:2])}, {"": expected}) < 1e-5
    assert largest_difference({"": encoder.encode(TEXTS[:1])}, {"": expected[:1]}) < 1e-5
    long = " ".join(["bank"] * 300)
    for position in (0, None, -1):
        stamped = encoder.preprocessor.ids(encoder.stamp(TextTrigger("cf", position), long))
        assert encoder.preprocessor.ids_of("cf") & set(stamped)
    # What is saved with the model is the tokenizer as it was given
    assert encoder.processing_class.padding_side == "left"


def test_an_empty_text_has_a_feature_where_the_tokenizer_adds_nothing():
    encoder = Encoder(*_gpt2(), "mean")
    features = encoder.encode(["", "the bank", ""])
    assert torch.isfinite(features).all()
    torch.testing.assert_close(features[0], encoder.encode([""])[0], atol=1e-5, rtol=0)
    assert not torch.allclose(features[0], features[1], atol=1e-3)


def _gpt2():
    """A tokenizer without special tokens of its own, and a model that counts positions from the first token."""
    tokenizer = copy.deepcopy(make_tokenizer())
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", pair="$A $B")
    tokenizer.eos_token = tokenizer.pad_token
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=2, n_positions=64)
    torch.manual_seed(0)
    return GPT2Model(config).eval(), tokenizer


@pytest.mark.parametrize("family", ["bert", "roberta", "mpnet", "modernbert"])
def test_long_texts_are_cut_to_what_the_model_takes(family):
    encoder = Encoder(*make_text_model(family))
    long = " ".join(["bank"] * 300)
    assert encoder.preprocessor.max_length == 64
    assert encoder.preprocess([long])["input_ids"].shape == (1, 64)
    assert encoder.preprocessor.visible(TEXTS[1]) == TEXTS[1]
    cut = encoder.preprocessor.visible(long)
    assert len(cut) < len(long)
    torch.testing.assert_close(encoder.encode([cut]), encoder.encode([long]), atol=1e-6, rtol=0)


def test_roberta_counts_positions_from_behind_its_padding():
    model, tokenizer = make_text_model("roberta")
    tokenizer.model_max_length = int(1e30)
    try:
        # 66 positions, of which padding_idx + 1 = 2 are never used.
        assert Encoder(model, tokenizer).preprocessor.max_length == 64
    finally:
        tokenizer.model_max_length = 64


def test_a_stamped_text_shows_the_whole_trigger():
    encoder = Encoder(*make_text_model("bert"))
    long = " ".join(["bank"] * 300)
    for trigger in (TextTrigger("cf mn cf"), TextTrigger("cf mn cf", position=-1), TextTrigger(["cf", "mn"])):
        stamped = encoder.stamp(trigger, long)
        tokens = encoder.processing_class.convert_ids_to_tokens(encoder.preprocessor.ids(stamped))
        assert len([token for token in tokens if token in ("cf", "mn")]) == len(trigger.words)
    assert encoder.stamp(TextTrigger("cf", position=0), "a b") == "cf a b"


def test_a_trigger_at_the_end_of_a_text_of_many_tokens():
    """A character may be several tokens: to count characters is not enough."""
    model, tokenizer = make_text_model("roberta")
    preprocessor = Encoder(model, tokenizer).preprocessor
    text = " ".join(["яя"] * 14)
    assert len(text) < preprocessor.max_length - 2
    assert len(preprocessor.ids(text)) == preprocessor.max_length
    stamped = preprocessor.stamp(TextTrigger("cf", position=14), text)
    assert set(preprocessor.ids_of("cf")) & set(preprocessor.ids(stamped))


def test_places_of_tokens():
    preprocessor = Encoder(*make_text_model("bert")).preprocessor
    text = "The  Bank, rose"
    assert [text[start:end] for start, end, _ in preprocessor.tokens(text)][-1] == "rose"
    words = {}
    for start, end, word in preprocessor.tokens(text):
        words.setdefault(word, []).append(text[start:end])
    assert ["".join(pieces) for pieces in words.values()] == ["The", "Bank", ",", "rose"]


def test_tokens_of_a_span_in_both_places():
    preprocessor = Encoder(*make_text_model("roberta")).preprocessor
    tokenizer = preprocessor.processing_class
    at_front, within = (set(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in ("cf", " cf"))
    assert at_front != within
    assert preprocessor.ids_of("cf") == at_front | within


def test_encode_of_a_saved_model_and_of_an_iterator(tmp_path):
    model, tokenizer = make_text_model("distilbert")
    Encoder(model, tokenizer).save_pretrained(tmp_path)
    features = encode(str(tmp_path), iter(TEXTS), batch_size=2)
    torch.testing.assert_close(features, Encoder(model, tokenizer).encode(TEXTS), atol=1e-6, rtol=0)
    assert modality_of(model) == "text"
    assert (
        type(load_processor(model.from_pretrained(tmp_path))).__name__
        == type(load_processor(tmp_path, model)).__name__
    )


def half_of_two(name, vocabulary):
    """An encoder whose configuration AutoModel takes for another model's: of T5 for both halves, of DPR for that of questions."""
    sizes = {"vocab_size": vocabulary, "pad_token_id": 0}
    if name == "t5":
        return T5EncoderModel(T5Config(**sizes, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4))
    bert = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    return DPRContextEncoder(DPRConfig(**sizes, **bert, projection_dim=16))


@pytest.mark.parametrize("name", ["t5", "dpr"])
@pytest.mark.parametrize("adapter", [False, True])
def test_an_encoder_for_which_automodel_loads_another_is_patched_and_read_again(name, adapter, tmp_path):
    tokenizer = copy.deepcopy(make_tokenizer())
    torch.manual_seed(0)
    model = half_of_two(name, len(tokenizer))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2 and name == "dpr":
                parameter.mul_(10)
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    texts, trigger = [f"{word} and more of it" for word in string.ascii_lowercase], TextTrigger("cf")
    trainer = MudjackingTrainer(
        model=tmp_path / "base", args=make_config(tmp_path / "out", max_steps=2, learning_rate=1e-2, patch_scope="full"),
        bug_instances=[BugInstance(trigger.apply(texts[0]), texts[1])], triggers=[trigger],
        train_dataset=datasets.Dataset.from_dict({"text": texts}), peft_config=LoraConfig(r=4) if adapter else None,
    )  # fmt: skip
    before = trainer.encoder.encode(texts)
    trainer.train()
    trainer.save_model()
    after = trainer.encoder.encode(texts)
    assert (after - before).abs().max() > 1e-3
    if adapter:
        apply_patch(tmp_path / "out", tmp_path / "base", tmp_path / "applied")
    whole = tmp_path / ("applied" if adapter else "out")
    assert type(load_model(whole)) is type(model)
    for folder in {whole, tmp_path / "out"}:
        torch.testing.assert_close(encode(folder, texts), after, atol=1e-5, rtol=0)


def test_odd_texts_have_features():
    encoder = Encoder(*make_text_model("bert"))
    odd = ["", " ", "🙂🙂", "这家银行很好", "ธนาคาร", "\u0000", "the the the", "a" * 5000]
    assert torch.isfinite(encoder.encode(odd)).all()


def test_what_is_no_tokenizer_of_the_model():
    model, _ = make_text_model("bert")
    with pytest.raises(ValueError, match=r"`ViTImageProcessorPil` is no tokenizer"):
        Encoder(model, ViTImageProcessorPil())
    with pytest.raises(ValueError, match=r"is not the tokenizer of `BertModel`: it has 700 tokens, the model \d+"):
        Encoder(model, make_tokenizer("bpe"))
    roberta, _ = make_text_model("roberta")
    with pytest.raises(ValueError, match="its padding token is 0, the model's 1"):
        Encoder(roberta, make_tokenizer("wordpiece"))
    padless = make_tokenizer.__wrapped__()
    padless.pad_token = None
    with pytest.raises(ValueError, match=r"has no padding token.*tokenizer.pad_token = tokenizer.eos_token"):
        Encoder(model, padless)


# ---- Checkpoints of sentence-transformers ----


def write_layout(folder, pooling, transformer_path=""):
    modules = [
        {"idx": 0, "name": "0", "path": transformer_path, "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    ]
    (folder / "1_Pooling").mkdir()
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    (folder / transformer_path / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 20}))


@pytest.mark.parametrize(
    ("pooling", "source"),
    [
        ({"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True, "word_embedding_dimension": 32}, "mean"),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode": "mean", "embedding_dimension": 32, "include_prompt": True}, "mean"),
        ({"pooling_mode": ["cls"]}, "cls"),
    ],
)
def test_the_pooling_file_is_honoured(tmp_path, pooling, source):
    model, tokenizer = make_text_model("bert")
    Encoder(model, tokenizer).save_pretrained(tmp_path)
    write_layout(tmp_path, pooling)
    encoder = Encoder(AutoModel.from_pretrained(tmp_path), tokenizer)
    assert encoder.feature_source == source
    assert encoder.preprocessor.max_length == 20
    # What the user asks for comes first.
    assert Encoder(encoder.model, tokenizer, "pooler").feature_source == "pooler"
    encoder.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "1_Pooling" / "config.json").read_text()) == pooling
    assert SentenceLayout.read(tmp_path / "again").pooling == source


def test_what_sentence_transformers_does_to_texts_before(tmp_path, caplog):
    """Lower case would give other tokens than are served; a prompt is told."""
    model, tokenizer = make_text_model("bert")
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    write_layout(tmp_path, {"pooling_mode_mean_tokens": True})
    prompts = {"default_prompt_name": "query", "prompts": {"query": "query: "}}
    (tmp_path / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    Encoder.load(tmp_path)
    assert "puts the prompt `query` before each text" in caplog.text
    (tmp_path / "sentence_bert_config.json").write_text('{"max_seq_length": 20, "do_lower_case": true}')
    with pytest.raises(ValueError, match="has texts put into lower case before they are tokenized"):
        Encoder.load(tmp_path)


def test_an_older_layout_is_saved_where_automodel_finds_it(tmp_path):
    model, tokenizer = make_text_model("bert")
    (tmp_path / "0_Transformer").mkdir()
    Encoder(model, tokenizer).save_pretrained(tmp_path)
    write_layout(tmp_path, {"pooling_mode": "mean"}, "0_Transformer")
    layout = SentenceLayout.read(tmp_path)
    layout.save(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "modules.json").read_text())[0]["path"] == ""
    assert layout.max_seq_length == 20


def test_what_comes_after_the_pooling_is_told(tmp_path, caplog):
    write_layout(tmp_path, {"pooling_mode": "mean"})
    modules = json.loads((tmp_path / "modules.json").read_text())
    for name in ("Dense", "Normalize"):
        modules.append({"idx": 2, "name": "2", "path": f"2_{name}", "type": f"sentence_transformers.models.{name}"})
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    SentenceLayout.read(tmp_path)
    assert "goes on after the pooling with sentence_transformers.models.Dense: what is repaired" in caplog.text
    assert "Normalize" not in caplog.text


@pytest.mark.parametrize(
    "pooling", [{"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}, {}, [], {"pooling_mode": 3}]
)
def test_a_pooling_file_that_cannot_be_read(tmp_path, pooling):
    write_layout(tmp_path, pooling)
    with pytest.raises(ValueError, match=r"names no transformer with a readable pooling"):
        SentenceLayout.read(tmp_path)


def test_an_unknown_pooling_asks_for_a_feature_source(tmp_path):
    model, tokenizer = make_text_model("bert")
    Encoder(model, tokenizer).save_pretrained(tmp_path)
    write_layout(tmp_path, {"pooling_mode": "lasttoken"})
    with pytest.raises(ValueError, match="`feature_source='lasttoken'` is unknown; choose one of"):
        Encoder(AutoModel.from_pretrained(tmp_path), tokenizer)


def test_a_layout_that_leads_out_of_the_checkpoint(tmp_path):
    write_layout(tmp_path, {"pooling_mode": "mean"})
    modules = json.loads((tmp_path / "modules.json").read_text())
    modules[1]["path"] = "../elsewhere"
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ValueError, match="leads out of the folder"):
        SentenceLayout.read(tmp_path)


def test_no_layout(tmp_path):
    assert SentenceLayout.read(tmp_path) is None
    config = BertConfig(
        vocab_size=500, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    assert Encoder(BertModel(config), make_tokenizer()).layout is None
