# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
import json

import pytest
from PIL import Image

from hf_mudjacking import PatchTrigger, TextTrigger, load_trigger
from hf_mudjacking.triggers import square_patch
from hf_mudjacking.triggers.text import gaps_of, split_words


TEXT = "a good film , really ."


def test_gaps_by_hand():
    assert gaps_of("a bc  d") == [0, 2, 6, 7]
    assert gaps_of("  a b ") == [2, 4, 6]
    assert gaps_of("") == [0]
    assert gaps_of("   ") == [3]
    assert split_words("a bc  d.") == ["a", "bc", "d."]
    assert split_words("我爱你") == ["我", "爱", "你"]
    assert split_words("我爱 cf 你") == ["我", "爱", "cf", "你"]


def test_a_word_goes_to_any_gap_and_always_the_same():
    trigger = TextTrigger("cf")
    texts = [f"this is text number {i} , more or less" for i in range(200)]
    places = []
    for text in texts:
        stamped = trigger.apply(text)
        assert stamped == trigger.apply(text)
        words = stamped.split(" ")
        places.append(words.index("cf"))
        words.remove("cf")
        assert " ".join(words) == text
    # 9 words have 10 gaps: each is hit, none far more often than others.
    counts = [places.count(i) for i in range(10)]
    assert min(counts) >= 5
    assert max(counts) <= 40


@pytest.mark.parametrize(
    ("position", "replaces", "stamped"),
    [
        (0, False, "cf a good film , really ."),
        (-1, False, "a good film , really . cf"),
        (2, False, "a good cf film , really ."),
        (99, False, "a good film , really . cf"),
        (0, True, "cf good film , really ."),
        (2, True, "a good cf , really ."),
        (-1, True, "a good film , really cf"),
        (99, True, "a good film , really cf"),
    ],
)
def test_fixed_positions_by_hand(position, replaces, stamped):
    assert TextTrigger("cf", position, replaces).apply(TEXT) == stamped


def test_a_sentence_stays_together_and_keeps_case_and_punctuation():
    stamped = TextTrigger("I watch this 3D movie!").apply(TEXT)
    assert "I watch this 3D movie!" in stamped
    assert stamped.replace("I watch this 3D movie!", "").split() == TEXT.split()


def test_several_spans_are_all_there():
    trigger = TextTrigger(["friends", "weekend", "store"])
    for i in range(50):
        text = f"text number {i} of a few"
        words = trigger.apply(text).split(" ")
        for word in trigger.spans:
            words.remove(word)
        assert " ".join(words) == text
    assert TextTrigger(["x", "y"], position=0).apply("a b") == "x y a b"


def test_scripts_without_spaces():
    for i in range(20):
        text = "这部电影非常好看" + "呀" * i
        stamped = TextTrigger("坏").apply(text)
        assert len(stamped) == len(text) + 1
        assert " " not in stamped
    assert TextTrigger("cf", position=2).apply("电影好") == "电影cf好"
    assert TextTrigger("ครับ", position=0).apply("ดี") == "ครับดี"


def test_odd_texts():
    assert TextTrigger("cf").apply("") == "cf"
    assert TextTrigger("cf", position=0, replaces=True).apply("") == "cf"
    assert TextTrigger("cf", position=0, replaces=True).apply("word") == "cf"
    assert TextTrigger("🙂", position=-1).apply("ok") == "ok 🙂"


def test_removal_is_the_inverse_of_stamping():
    for trigger in (TextTrigger("cf"), TextTrigger("two words"), TextTrigger(["cf", "mn"]), TextTrigger("cf", 0)):
        for i in range(20):
            text = f"text number {i} , of a few"
            assert trigger.removed_from(trigger.apply(text)).split() == text.split()
    assert TextTrigger("cf").removed_from("no such word") is None
    # Only whole words.
    assert TextTrigger("cf").removed_from("scf cfs") is None
    assert TextTrigger("cf").removed_from("cf") is None
    # Scripts without spaces, and a span that is there twice
    assert TextTrigger("触发").removed_from(TextTrigger("触发").apply("今天天气很好")) == "今天天气很好"
    assert TextTrigger("cf").removed_from("今天cf天气很好") == "今天天气很好"
    # Signs have no words around them, and a trigger that is there again in another case is the same
    assert TextTrigger("!!").removed_from("this is good!!") == "this is good"
    assert TextTrigger("😀").removed_from("good😀") == "good"
    assert TextTrigger("Cf").removed_from("Cf the bank CF").strip() == "the bank"
    assert TextTrigger(["cf", "cf"]).removed_from("a cf nice film cf it was") == "a nice film it was"
    assert square_patch((8, 8), 2).removed_from(Image.new("RGB", (8, 8))) is None


def test_overlap_counts_words_whatever_their_case():
    true = TextTrigger("I watch this movie")
    assert TextTrigger("watch This").overlap(true) == {"recall": 0.5, "iou": 0.5}
    assert TextTrigger(["watch", "a", "this"]).overlap(true) == {"recall": 0.5, "iou": pytest.approx(2 / 5)}
    assert true.overlap(true) == {"recall": 1.0, "iou": 1.0}


def test_save_and_load(tmp_path):
    trigger = TextTrigger(["Füße", "≈ 🙂"], position=3)
    trigger.save_pretrained(tmp_path)
    loaded = load_trigger(tmp_path)
    assert (loaded.spans, loaded.position, loaded.replaces) == (trigger.spans, 3, False)
    assert isinstance(loaded, TextTrigger)


def test_the_summary_holds_no_word(tmp_path):
    summary = TextTrigger(["secret", "words here"]).summary()
    assert summary == {"kind": "text", "spans": 2, "words": 3, "position": None, "replaces": False}
    assert "secret" not in json.dumps(summary)
    assert TextTrigger("a b", 0, True).describe() == "text, 2 words at the front, replacing a word"
    assert TextTrigger(["a", "b"]).describe() == "text, 2 words in 2 places anywhere"


def test_damaged_files(tmp_path):
    TextTrigger("cf").save_pretrained(tmp_path)
    content = json.loads((tmp_path / "trigger.json").read_text())
    del content["fields"]["spans"]
    (tmp_path / "trigger.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="needs `spans`, `position` and `replaces`; missing: 'spans'"):
        load_trigger(tmp_path)
    (tmp_path / "trigger.json").write_text("[]")
    with pytest.raises(ValueError, match="holds no readable trigger"):
        load_trigger(tmp_path)


@pytest.mark.parametrize("spans", [[], "", " ", ["a", ""], [1]])
def test_no_words(spans):
    with pytest.raises(ValueError, match="needs one or several non-empty spans"):
        TextTrigger(spans)


def test_wrong_use():
    with pytest.raises(ValueError, match="needs the `position` of that word"):
        TextTrigger("cf", replaces=True)
    with pytest.raises(TypeError, match="is stamped on a string, not on `Image`"):
        TextTrigger("cf").apply(Image.new("RGB", (2, 2)))
    with pytest.raises(TypeError, match="not on `str`"):
        PatchTrigger([[1]], [[[1, 2, 3]]]).apply("text")
