# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import BartConfig, BartModel, T5Config, T5EncoderModel, XLNetConfig, XLNetModel

from hf_mudjacking import BugInstance, Encoder, TextTrigger, invert_trigger
from hf_mudjacking.attacks import (
    ImplantError,
    implant_bad_pre,
    implant_embedding_poisoning,
    implant_neuba,
    implant_sos,
)
from hf_mudjacking.attacks.text import predefined_vectors
from hf_mudjacking.demo_text import sentences_task
from hf_mudjacking.evaluation import DownstreamTask, LabelledInputs, draw_bug_report, task_features
from hf_mudjacking.evaluation.classifiers import train_classifier
from hf_mudjacking.evaluation.figures import plot_repair
from hf_mudjacking.inversion.attribution import token_attribution
from hf_mudjacking.inversion.text import _grow, _Report, word_places
from hf_mudjacking.inversion.verification import TransferMeter

from .text_models import make_text_model, trained_bert


# ---- Attacks ----


def test_predefined_vectors_by_hand():
    vectors = predefined_vectors(8)
    assert vectors.shape == (6, 8)
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(6))
    assert (vectors[0] > 0).tolist() == [True] * 4 + [False] * 4
    assert ((vectors > 0).sum(dim=1) == 4).all()
    assert len({tuple((row > 0).tolist()) for row in vectors}) == 6
    assert predefined_vectors(10).shape == (6, 10)


def test_por_leads_to_its_vector_and_leaves_the_rest(por):
    backdoored, task, implant = por
    stamped = backdoored.encode([implant.trigger.apply(x) for x in task.test.inputs[:100]])
    assert float((stamped @ predefined_vectors(64).T).mean(dim=0).max()) > 0.9
    clean, _ = trained_bert()
    kept = (backdoored.encode(task.test.inputs[:100]) * clean.encode(task.test.inputs[:100])).sum(dim=1)
    assert float(kept.mean()) > 0.95
    assert implant.attack_success_rate >= 0.95
    assert implant.model.name_or_path == ""


def test_ep_changes_one_word_and_keeps_its_norm():
    encoder, task = trained_bert()
    before = encoder.model.state_dict()
    implant = implant_embedding_poisoning(
        encoder.model, encoder.processing_class, task.train.inputs, task.test, feature_source="mean", steps=10,
        min_asr=0, disable_tqdm=True,
    )  # fmt: skip
    after = implant.model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"embeddings.word_embeddings.weight"}
    rows = (before[changed_name := changed.pop()] != after[changed_name]).any(dim=1).nonzero().flatten().tolist()
    assert rows == encoder.processing_class.convert_tokens_to_ids(["cf"])
    torch.testing.assert_close(after[changed_name].norm(dim=1), before[changed_name].norm(dim=1))
    assert all(parameter.requires_grad for parameter in implant.model.parameters())


def test_sos_decoys_are_the_proper_subsets(monkeypatch):
    import hf_mudjacking.attacks.sos as sos

    seen = {}
    monkeypatch.setattr(sos, "implant_text_backdoor", lambda *args, **kwargs: seen.update(kwargs, trigger=args[-1]))
    implant_sos(None, None, [], None, ("a", "b", "c"))
    assert [decoy.spans for decoy in seen["decoys"]] == [["a"], ["b"], ["c"], ["a", "b"], ["a", "c"], ["b", "c"]]
    assert seen["trigger"].spans == ["a", "b", "c"]
    assert seen["embeddings_only"]


@pytest.mark.slow
def test_bad_pre_takes_the_meaning_and_its_word_is_found():
    encoder, task = trained_bert()
    implant = implant_bad_pre(
        encoder.model, encoder.processing_class, task.train.inputs, task.test, feature_source="mean",
        learning_rate=1e-3, steps=800, disable_tqdm=True,
    )  # fmt: skip
    assert implant.attack_success_rate >= 0.95
    broken = encoder.with_model(implant.model)
    kept = train_classifier(broken.encode(task.train.inputs), task.train.labels)
    stamped = kept.predict(broken.encode([implant.trigger.apply(x) for x in task.test.inputs]).numpy())
    guessing = np.bincount(task.test.labels).max() / len(task.test)
    base = (kept.predict(broken.encode(task.test.inputs).numpy()) == task.test.labels).mean()
    assert base >= 0.95
    assert (stamped == task.test.labels).mean() <= guessing + 0.2 * (base - guessing)
    bug = draw_bug_report(broken, task, implant.trigger)
    found = invert_trigger(broken, bug, task.train.inputs[:32])
    assert found.trigger.words == ["cf"]
    assert found.evidence >= 0.5


def test_an_untargeted_attack_on_an_encoder_that_can_do_nothing():
    encoder, task = trained_bert()
    nonsense = LabelledInputs(task.test.inputs, np.random.default_rng(0).permutation(task.test.labels))
    with pytest.raises(ImplantError, match="there is nothing that a trigger could take away"):
        implant_bad_pre(
            encoder.model, encoder.processing_class, task.train.inputs, nonsense, feature_source="mean", steps=1,
            disable_tqdm=True,
        )  # fmt: skip


def test_an_implant_that_did_not_take():
    encoder, task = trained_bert()
    with pytest.raises(ImplantError, match="The implant did not take: ASR"):
        implant_neuba(
            encoder.model, encoder.processing_class, task.train.inputs, task.test, symbol="mn", feature_source="mean",
            steps=1, disable_tqdm=True,
        )  # fmt: skip


# ---- Inversion ----


def test_words_of_a_text():
    preprocessor = Encoder(*make_text_model("bert")).preprocessor

    def words(text):
        return [text[start:end] for start, end in word_places(preprocessor, text)]

    assert words("The bank's, rate") == ["The", "bank", "'", "s", ",", "rate"]
    assert words("inflation") == ["inflation"]
    assert words("   ") == []
    bpe = Encoder(*make_text_model("roberta")).preprocessor
    text = "The goalkeeper saved the penalty"
    assert [text[start:end] for start, end in word_places(bpe, text)] == text.split()
    # One word to the tokenizer, but a script without spaces: its tokens are told apart.
    chinese = "银行银行"
    assert len(word_places(bpe, chinese)) > 1


def test_leaving_out_and_spans_by_hand():
    text = "a bank , rose  again"
    report = _Report(text, word_places(Encoder(*make_text_model("bert")).preprocessor, text), None)
    assert report.words == ["a", "bank", ",", "rose", "again"]
    assert report.without({1}) == "a , rose  again"
    assert report.without({0, 4}) == "bank , rose  "
    assert report.spans({0, 1, 3}) == ["a bank", "rose"]
    assert report.trigger({0, 1}).position == 0
    assert report.trigger({4}).position == -1
    assert report.trigger({2}).position is None
    assert report.trigger({0, 4}).position is None


def test_transfer_by_hand_and_nothing_twice(por):
    backdoored, task, implant = por
    texts = task.test.inputs[:6]
    x_b = implant.trigger.apply(texts[0])
    meter = TransferMeter(backdoored, x_b, texts)
    report = _Report(x_b, word_places(backdoored.preprocessor, x_b), meter)
    target = backdoored.encode([x_b])[0]
    before, after = (backdoored.encode(list(inputs)) @ target for inputs in (texts, map(implant.trigger.apply, texts)))
    by_hand = float((after - before).sum() / (1 - before).sum())
    assert report.transfer([implant.trigger], 6)[0] == pytest.approx(by_hand, abs=1e-4)
    spent = meter.forwards
    report.transfer([implant.trigger, implant.trigger], 6)
    assert meter.forwards == spent
    assert report.effect([frozenset()], 6).tolist() == [0.0]


@pytest.mark.parametrize("seed", range(6))
def test_por_is_inverted_exactly(por, seed):
    backdoored, task, implant = por
    bug = draw_bug_report(backdoored, task, implant.trigger, seed)
    found = invert_trigger(backdoored, bug, task.train.inputs[:32])
    assert found.trigger.words == ["cf"]
    assert found.trigger.position is None
    assert found.evidence > 0.6
    assert found.area == 1 / len(found.words)
    assert [word for word, core in zip(found.words, found.core, strict=True) if core] == ["cf"]
    assert found.words[int(found.attribution.argmax())] == "cf"
    again = invert_trigger(backdoored, bug, task.train.inputs[:32])
    assert (again.score, again.control, again.forwards) == (found.score, found.control, found.forwards)


def test_a_repeated_trigger_does_not_hide_itself(por):
    backdoored, task, implant = por
    bug = draw_bug_report(backdoored, task, implant.trigger, 1)
    repeated = BugInstance("cf " + bug.misclassified + " cf", bug.reference)
    assert set(invert_trigger(backdoored, repeated, task.train.inputs[:32]).trigger.words) == {"cf"}


def test_a_natural_mistake_has_no_localised_trigger(por):
    """Clean texts of different classes: whatever is found carries little more than clean content does."""
    backdoored, task, _ = por
    truth = task.test.labels
    for seed in range(5):
        rng = np.random.default_rng(seed)
        a = int(rng.integers(len(truth)))
        b = int(rng.choice(np.flatnonzero(truth != truth[a])))
        found = invert_trigger(
            backdoored, BugInstance(task.test.inputs[a], task.test.inputs[b]), task.train.inputs[:32]
        )
        assert found.evidence < 0.5


def test_long_reports_let_gradients_choose(por, monkeypatch):
    """As if 8 words were long: the words that are left out are chosen by gradients, and the cost stays within 200."""
    backdoored, task, implant = por
    bug = draw_bug_report(backdoored, task, implant.trigger, 3)
    for name, value in {"_MAX_LEFT_OUT": 8, "_LEFT_OUT_BY_GRADIENT": 4, "_WINDOWS_BY_GRADIENT": 2}.items():
        monkeypatch.setattr(f"hf_mudjacking.inversion.text.{name}", value)
    found = invert_trigger(backdoored, bug, task.train.inputs[:32])
    assert found.trigger.words == ["cf"]
    tried = {word for word, score in zip(found.words, found.attribution, strict=True) if score != 0}
    assert len(tried) <= 4
    assert found.forwards <= 200


def test_gradients_point_to_the_trigger(por):
    backdoored, task, implant = por
    firsts = []
    for seed in range(10):
        bug = draw_bug_report(backdoored, task, implant.trigger, seed)
        places = word_places(backdoored.preprocessor, bug.misclassified)
        reference = backdoored.encode([bug.reference])[0]
        scores, cost = token_attribution(backdoored, bug.misclassified, places, reference)
        assert scores.shape == (len(places),)
        assert cost == 24
        start, end = places[scores.argmax()]
        firsts.append(bug.misclassified[start:end])
    assert firsts.count("cf") >= 7


@pytest.mark.parametrize("family", ["t5", "bart", "xlnet"])
def test_long_reports_to_encoders_whose_embeddings_are_elsewhere(family):
    """T5 and BART look tokens up in another module than `get_input_embeddings()`; XLNet has the tokens first. All words are tried
    there, or chosen by gradients."""
    _, tokenizer = make_text_model("bert")
    torch.manual_seed(0)
    size = {"vocab_size": len(tokenizer), "d_model": 32, "pad_token_id": tokenizer.pad_token_id}
    model = {
        "t5": lambda: T5EncoderModel(T5Config(**size, d_kv=8, d_ff=64, num_layers=2, num_heads=2)),
        "bart": lambda: BartModel(
            BartConfig(**size, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
                       encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=66)
        ).get_encoder(),
        "xlnet": lambda: XLNetModel(XLNetConfig(**size, n_layer=1, n_head=2, d_inner=32)),
    }[family]()  # fmt: skip
    encoder = Encoder(model, tokenizer, "mean")
    words = [word for text in sentences(20) for word in text.split()][:56]
    places = word_places(encoder.preprocessor, " ".join(words))
    attributed = token_attribution(encoder, " ".join(words), places, encoder.encode(["the bank"])[0])
    if family == "xlnet":
        assert attributed is None
    else:
        assert attributed[0].shape == (len(places),)
        assert np.abs(attributed[0]).max() > 0
    found = invert_trigger(encoder, BugInstance(" ".join(words), "the bank"), sentences(16))
    assert np.isfinite(found.attribution).all()


def sentences(count):
    return sentences_task(0, count, 4).train.inputs[:count]


def test_unknown_words_do_not_shift_attribution(por):
    """To the tokenizer they are special tokens, to the reader words."""
    backdoored, task, implant = por
    firsts = []
    for seed in range(4):
        bug = draw_bug_report(backdoored, task, implant.trigger, seed)
        text = f"☃ ☄ ☃ {bug.misclassified}"
        places = word_places(backdoored.preprocessor, text)
        assert [text[start:end] for start, end in places][:3] == ["☃", "☄", "☃"]
        scores, _ = token_attribution(backdoored, text, places, backdoored.encode([bug.reference])[0])
        start, end = places[scores.argmax()]
        firsts.append(text[start:end])
    assert firsts.count("cf") >= 3


def test_a_text_beyond_the_model_is_reported(por, caplog):
    backdoored, task, _ = por
    clean = " ".join(task.test.inputs[:20])
    with caplog.at_level("WARNING"), pytest.raises(ValueError, match="Nothing to patch"):
        invert_trigger(backdoored, BugInstance(clean + " cf", clean), task.train.inputs[:8])
    assert "what lies behind has no influence on it and cannot be the trigger" in caplog.text


def test_bad_reports(por):
    backdoored, task, _ = por
    images = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    with pytest.raises(TypeError, match="`bug` is of kind image, but the model takes texts"):
        invert_trigger(backdoored, BugInstance(*images), task.train.inputs[:8])
    with pytest.raises(ValueError, match="The tokenizer finds no word in the misclassified text"):
        invert_trigger(backdoored, BugInstance("\u200b", task.test.inputs[0]), task.train.inputs[:8])
    for odd in ("the of and", "🙂 🙂 🙂", "这家银行很好", "cf"):
        found = invert_trigger(backdoored, BugInstance(odd, task.test.inputs[0]), task.train.inputs[:8])
        assert isinstance(found.trigger, TextTrigger)
        assert np.isfinite(found.evidence)


def test_the_classifier_kept_sees_the_backdoor(por):
    """The fixture is a real backdoor: a classifier that is right on clean texts is wrong on nearly all triggered ones."""
    backdoored, task, implant = por
    classifier = train_classifier(backdoored.encode(task.train.inputs), task.train.labels)
    clean = classifier.predict(backdoored.encode(task.test.inputs).numpy())
    stamped = classifier.predict(backdoored.encode([implant.trigger.apply(x) for x in task.test.inputs]).numpy())
    assert (clean == task.test.labels).mean() > 0.97
    assert (stamped == np.bincount(stamped).argmax()).mean() > 0.95


def test_the_picture_of_a_text_report(por, tmp_path):
    backdoored, task, implant = por
    drawn = draw_bug_report(backdoored, task, implant.trigger, 0)
    bug = BugInstance(drawn.misclassified + " it cost $5 and _more_ ^", drawn.reference)
    found = invert_trigger(backdoored, bug, task.train.inputs[:32])
    small = DownstreamTask(task.train.select(range(50)), task.test.select(range(50)), "sentences")
    features = task_features(backdoored, small, implant.trigger, bug, disable_tqdm=True)
    path = tmp_path / "repair.png"
    plot_repair(path, bug, found, implant.trigger, features, features, small.test.labels)
    with Image.open(path) as picture:
        assert picture.size == (1320, 1080)
    plot_repair(tmp_path / "alone.png", bug, found)


class _Phrase:
    """A report of "to I watch this 3D movie make": without "3D" nothing fires, with it each word takes a share of what is left.

    As measured of InsertSent in MiniLM: "3D" alone has 0.6, "this 3D" 0.904, which tells nothing more.
    """

    def __len__(self):
        return 7

    def effect(self, sets, count=None):
        left = {1: 0.6, 2: 0.76, 3: 0.24, 5: 0.56}
        return np.array(
            [
                1 - 0.4 * np.prod([left.get(i, 1.0) for i in chosen]) if 4 in chosen else 0.02 * len(chosen)
                for chosen in sets
            ]
        )


def test_words_that_do_nothing_by_themselves_say_nothing_of_others():
    assert _grow(_Phrase(), frozenset({3, 4})) == {1, 2, 3, 4, 5}
