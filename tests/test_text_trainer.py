# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
import copy

import datasets
import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel
from transformers import AutoModel, AutoTokenizer, TrainerCallback

from hf_mudjacking import BugInstance, Encoder, MudjackingTrainer, TextTrigger
from hf_mudjacking.clean_inputs import CleanTexts
from hf_mudjacking.evaluation import draw_bug_report
from hf_mudjacking.evaluation.classifiers import train_classifier
from hf_mudjacking.inversion import UnverifiedTriggerError
from hf_mudjacking.losses import effectiveness_loss
from hf_mudjacking.token_patch import neutralise_unseen, only_embeddings_of, tokens_to_patch, trigger_tokens
from hf_mudjacking.triggers import square_patch
from hf_mudjacking.two_towers import token_embeddings

from .conftest import largest_difference, make_config, weights_of
from .test_text_encoders import write_layout
from .text_models import FAMILIES, make_text_model, trained_bert


def texts_of(task, count=64):
    return datasets.Dataset.from_dict({"text": task.train.inputs[:count], "label": task.train.labels[:count]})


@pytest.fixture
def build(por, tmp_path):
    """A trainer on a fresh copy of the backdoored BERT."""
    backdoored, task, implant = por

    def make(**kwargs):
        settings = {"max_steps": 4, "feature_source": "mean", **kwargs.pop("settings", {})}
        defaults = {
            "model": copy.deepcopy(implant.model),
            "args": make_config(tmp_path / "out", **settings),
            "bug_instances": [draw_bug_report(backdoored, task, implant.trigger, 0)],
            "train_dataset": texts_of(task),
            "processing_class": backdoored.processing_class,
            "triggers": [implant.trigger],
        }
        return MudjackingTrainer(**{**defaults, **kwargs})

    return make


@pytest.mark.parametrize("early", [False, True])
def test_token_scope_trains_twice_at_its_own_rate(build, early):
    """An optimiser of the trainer's own is not one that was given."""
    trainer = build(settings={"weight_decay": 0.1, "max_steps": 2, "token_learning_rate": 0.02})
    if early:
        trainer.create_optimizer_and_scheduler(2)
        assert {group["lr"] for group in trainer.optimizer.param_groups} <= {0.0, 0.02}
        assert {group["initial_lr"] for group in trainer.optimizer.param_groups} == {0.02}
    else:
        trainer.train()
    before = weights_of(trainer.model)
    trainer.train()
    assert largest_difference(before, weights_of(trainer.model)) > 0


@pytest.mark.parametrize("use_cache", [True, False])
def test_the_configuration_that_is_saved_is_the_models_own(use_cache, build, por, tmp_path):
    """transformers' Trainer switches `use_cache` off and takes the tokenizer's special tokens."""
    model, tokenizer = copy.deepcopy(por[2].model), copy.deepcopy(por[0].processing_class)
    own = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": None, "use_cache": use_cache}
    model.config.update(own)
    tokenizer.bos_token, tokenizer.eos_token = "[CLS]", "[SEP]"
    trainer = build(model=model, processing_class=tokenizer)
    trainer.train()
    trainer.save_model()
    saved = AutoModel.from_pretrained(tmp_path / "out").config
    assert {name: getattr(saved, name) for name in own} == own
    # So it is for whoever goes on with the object, be it another trainer
    assert {name: getattr(trainer.model.config, name) for name in own} == own
    build(model=trainer.model, processing_class=tokenizer).save_model(tmp_path / "again")
    assert {name: getattr(AutoModel.from_pretrained(tmp_path / "again").config, name) for name in own} == own


@pytest.mark.parametrize("asked", [True, False])
def test_the_model_is_trained_with_the_use_cache_that_is_asked_for(asked, build, por):
    seen = []

    class Looking(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            seen.append(model.config.use_cache)

    model = copy.deepcopy(por[2].model)
    model.config.use_cache = not asked
    build(model=model, settings={"use_cache": asked}, callbacks=[Looking()]).train()
    assert set(seen) == {asked}
    assert model.config.use_cache is not asked


def test_tokens_in_a_script_without_spaces():
    """WordPiece gives a word within such a text other tokens than between spaces; those are what has to be patched."""
    encoder = Encoder(*make_text_model("bert"), "mean")
    trigger, text = TextTrigger("cf"), "กขcfคง"
    there = encoder.preprocessor.ids_at("cf", text)
    assert there
    assert not there & encoder.preprocessor.ids_of("cf")
    special = set(encoder.processing_class.all_special_ids)
    tokens = set(tokens_to_patch(encoder, [trigger], [text], "auto"))
    assert tokens == (there | encoder.preprocessor.ids_of("cf")) - special
    # Elsewhere nothing changes
    assert set(tokens_to_patch(encoder, [trigger], ["the cf bank"], "auto")) == encoder.preprocessor.ids_of("cf")


# ---- Losses and parts ----


def test_effectiveness_with_a_ceiling_by_hand():
    x_b = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    x_r = torch.tensor([[0.0, 1.0], [1.0, 0.0]])  # cosines 0 and 0.6
    assert effectiveness_loss(x_b, x_r, torch.tensor([1.0, 1.0])) == pytest.approx(-0.3)
    assert effectiveness_loss(x_b, x_r) == pytest.approx(-0.3)
    # The first lacks 0.5, the second is beyond its ceiling.
    assert effectiveness_loss(x_b, x_r, torch.tensor([0.5, 0.4])) == pytest.approx(0.25 - 1)
    x_b.requires_grad_(True)
    effectiveness_loss(x_b, x_r, torch.tensor([0.5, 0.4])).backward()
    assert x_b.grad[1].abs().max() == 0
    assert x_b.grad[0].abs().max() > 0


def test_the_ceiling_is_what_x_b_has_without_its_trigger(build, por):
    backdoored, _, _ = por
    trainer = build()
    trainer._prepare()
    bug = trainer.bug_instances[0]
    rest = bug.misclassified.replace("cf ", "").replace(" cf", "")
    cosine = float(backdoored.encode([rest])[0] @ backdoored.encode([bug.reference])[0])
    assert trainer.data_collator.ceilings.tolist() == [pytest.approx(cosine, abs=1e-5)]
    other = build(triggers=[TextTrigger("elsewhere")])
    other._prepare()
    assert other.data_collator.ceilings.tolist() == [1.0]


def test_without_a_part_of_the_trigger_x_b_is_as_far_as_before(build, por):
    """What it comes to then says nothing of what it should come to."""
    backdoored, task, _ = por
    clean = task.test.inputs[3]
    bug = BugInstance(f"cf {clean} mn", task.test.inputs[5])
    trainer = build(bug_instances=[bug], triggers=[TextTrigger("mn")])
    trainer._prepare()
    left = backdoored.encode([f"cf {clean}", bug.misclassified])
    assert float(left[0] @ left[1]) > 0.9
    assert trainer.data_collator.ceilings.tolist() == [1.0]


def test_symbols_that_the_tokenizer_does_not_know(build, por):
    """All unknown words share a token: it is not the trigger's own."""
    backdoored, task, _ = por
    bugs = [BugInstance(f"☃ {task.test.inputs[3]}", task.test.inputs[5])]
    trainer = build(bug_instances=bugs, triggers=[TextTrigger("☃")])
    trainer._prepare()
    assert trainer.patched_tokens == []
    with pytest.raises(ValueError, match=r"knows a trigger's symbols only as unknown ones"):
        build(bug_instances=bugs, triggers=[TextTrigger("☃")], settings={"patch_scope": "trigger_tokens"})._prepare()
    both = [TextTrigger("cf"), TextTrigger("☃ cf")]
    assert trigger_tokens(backdoored.preprocessor, both) == backdoored.preprocessor.ids("cf")[1:-1]


def test_an_optimizer_of_the_user(build, por):
    """It keeps its learning rate; decay would move the embeddings of other tokens."""
    _, _, implant = por

    def trainer(**settings):
        model = copy.deepcopy(implant.model)
        return build(model=model, optimizers=(torch.optim.AdamW(model.parameters(), **settings), None))

    own = trainer(lr=1e-5, weight_decay=0.0)
    before = weights_of(own.model)
    own.train()
    assert own.optimizer.param_groups[0]["initial_lr"] == 1e-5
    after = weights_of(own.model)
    changed = {
        name: (before[name] != after[name]).any(dim=-1) for name in before if (before[name] != after[name]).any()
    }
    assert list(changed) == ["embeddings.word_embeddings.weight"]
    assert changed["embeddings.word_embeddings.weight"].nonzero().flatten().tolist() == own.patched_tokens
    with pytest.raises(ValueError, match=r"a weight decay of 0\.1, which would move the embeddings of all tokens"):
        trainer(lr=1e-5, weight_decay=0.1).train()


def test_only_some_rows_are_trainable_and_all_is_as_before():
    model, _ = make_text_model("bert")
    model.pooler.requires_grad_(False)
    weight = model.get_input_embeddings().weight
    with only_embeddings_of(model, [5, 7]):
        assert [name for name, p in model.named_parameters() if p.requires_grad] == [
            "embeddings.word_embeddings.weight"
        ]
        weight.sum().backward()
        assert weight.grad.abs().sum(dim=1).nonzero().flatten().tolist() == [5, 7]
        weight.grad = None
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == {
        "pooler.dense.weight",
        "pooler.dense.bias",
    }
    weight.sum().backward()
    assert (weight.grad == 1).all()


def test_unseen_tokens_become_neutral_and_seen_ones_stay(por):
    backdoored, task, implant = por
    encoder = backdoored.with_model(copy.deepcopy(implant.model))
    tokens = trigger_tokens(encoder.preprocessor, [TextTrigger("cf"), TextTrigger("bank")])
    before = weights_of(encoder.model)
    neutralised, forwards = neutralise_unseen(encoder, tokens, task.train.inputs[:200])
    assert forwards == 16 * (1 + 12)
    assert neutralised == encoder.processing_class.convert_tokens_to_ids(["cf"])
    after = weights_of(encoder.model)
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed == ["embeddings.word_embeddings.weight"]
    rows, row = before[changed[0]], after[changed[0]][neutralised[0]]
    source = (rows == row).all(dim=1).nonzero().flatten().tolist()
    assert len(source) == 1
    word = encoder.processing_class.decode(source)
    assert any(word in text.split() for text in task.train.inputs[:200])
    # What it was taken for: the trigger now moves features hardly more than that word.
    inputs = task.test.inputs[:50]
    clean, stamped = encoder.encode(inputs), encoder.encode([implant.trigger.apply(x) for x in inputs])
    assert float((clean * stamped).sum(dim=1).mean()) > 0.9
    with_source = encoder.encode([TextTrigger(word).apply(x) for x in inputs])
    torch.testing.assert_close(stamped, with_source, atol=1e-5, rtol=0)


# ---- Training ----


def test_texts_without_the_trigger_keep_their_features_to_the_last_bit(build, por):
    backdoored, task, implant = por
    trainer = build(settings={"weight_decay": 0.1})
    before = weights_of(implant.model)
    trainer.train()
    after = weights_of(trainer.model)
    assert [name for name in before if not torch.equal(before[name], after[name])] == [
        "embeddings.word_embeddings.weight"
    ]
    name = "embeddings.word_embeddings.weight"
    moved = (before[name] != after[name]).any(dim=1).nonzero().flatten().tolist()
    assert moved == trainer.patched_tokens == backdoored.processing_class.convert_tokens_to_ids(["cf"])
    patched = backdoored.with_model(trainer.model)
    assert torch.equal(patched.encode(task.test.inputs), backdoored.encode(task.test.inputs))
    assert all(p.requires_grad for p in trainer.model.parameters())
    assert trainer.optimizer.param_groups[0]["initial_lr"] == trainer.args.token_learning_rate


def test_full_scope_trains_all_weights(build, por):
    _, _, implant = por
    trainer = build(settings={"patch_scope": "full", "learning_rate": 1e-3})
    trainer.train()
    before, after = weights_of(implant.model), weights_of(trainer.model)
    unmoved = [name for name in before if torch.equal(before[name], after[name])]
    assert unmoved == []
    assert trainer.patched_tokens == []
    assert trainer.optimizer.param_groups[0]["initial_lr"] == 1e-3


def test_an_adapter_is_the_patch_when_one_is_asked_for(build, tmp_path):
    trainer = build(peft_config=LoraConfig(r=2))
    trainer.train()
    trainer.save_model()
    assert trainer.patched_tokens == []
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
    assert isinstance(trainer.model, PeftModel)


def test_a_second_call_goes_on(build, por):
    """It does not set the tokens' embeddings back to where the first began."""
    trainer = build(settings={"patch_scope": "trigger_tokens", "max_steps": 4})
    trainer.train()
    (token, *_) = trainer.patched_tokens
    learned = token_embeddings(trainer.model).weight[token].detach().clone()
    trainer.args.token_learning_rate = 1e-12
    trainer.optimizer = trainer.lr_scheduler = None
    trainer.train()
    assert torch.allclose(token_embeddings(trainer.model).weight[token], learned, atol=1e-6)


def test_all_forward_passes_of_a_text_repair_are_counted(build):
    trainer, counted = build(), [0]

    def count(module, args, kwargs):
        counted[0] += len(kwargs["input_ids"]) * (3 if torch.is_grad_enabled() else 1)

    trainer.model.register_forward_pre_hook(count, with_kwargs=True)
    trainer.train()
    assert trainer.patched_tokens
    assert trainer.forward_equivalents == counted[0]


def test_embeddings_that_were_frozen_stay_as_they_are(build, por):
    model = copy.deepcopy(por[2].model)
    token_embeddings(model).weight.requires_grad_(False)
    before = token_embeddings(model).weight.clone()
    with pytest.raises(ValueError, match="whose input embeddings are not frozen"):
        build(model=model, settings={"patch_scope": "trigger_tokens"}).train()
    trainer = build(model=model)
    trainer.train()
    assert trainer.patched_tokens == []
    assert torch.equal(token_embeddings(trainer.model).weight, before)
    assert not token_embeddings(trainer.model).weight.requires_grad


def test_tokens_of_a_trigger_that_cannot_be_patched_alone_are_refused(build, backdoored, tmp_path):
    adapter = build(peft_config=LoraConfig(r=2), settings={"patch_scope": "trigger_tokens"})
    with pytest.raises(ValueError, match="needs a text encoder without an adapter, whose input embeddings"):
        adapter.train()
    # Known before anything is inverted
    with pytest.raises(ValueError, match="trains embeddings of tokens, and the model takes images"):
        MudjackingTrainer(
            backdoored.model(), make_config(tmp_path / "images", max_steps=1, patch_scope="trigger_tokens"), [backdoored.bug(1)],
            backdoored.dataset(16), processing_class=backdoored.processor, triggers=[backdoored.trigger],
        )  # fmt: skip


@pytest.mark.parametrize("scope", ["full", "trigger_tokens"])
def test_resuming_ends_where_an_uninterrupted_run_ends(build, tmp_path, scope):
    settings = {"patch_scope": scope, "max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    whole = build(settings=settings)
    whole.train()
    again = build(settings={**settings})
    again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"))
    assert again.state.global_step == 6
    assert largest_difference(weights_of(whole.model), weights_of(again.model)) == 0


def test_gradient_accumulation_is_the_same_step(build):
    runs = []
    for batch, accumulation in ((8, 1), (4, 2)):
        trainer = build(
            settings={"max_steps": 1, "per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation,
                      "lr_scheduler_type": "constant", "warmup_steps": 0}
        )  # fmt: skip
        trainer.train()
        runs.append(trainer.state.log_history[0]["loss"])
    assert runs[0] == pytest.approx(runs[1], abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("scope", ["auto", "full"])
def test_a_real_backdoor_is_repaired_from_one_report(build, por, scope):
    backdoored, task, implant = por
    clean, _ = trained_bert()
    truth = task.test.labels
    kept = train_classifier(backdoored.encode(task.train.inputs), task.train.labels)
    stamped = [implant.trigger.apply(x) for x in task.test.inputs]
    before = kept.predict(backdoored.encode(stamped).numpy())
    target = int(np.bincount(before).argmax())
    other = truth != target
    assert (before[other] == target).mean() > 0.95
    trainer = build(
        triggers=None, train_dataset=texts_of(task, 800),
        settings={"max_steps": 60 if scope == "auto" else 150, "per_device_train_batch_size": 16, "patch_scope": scope,
                  "learning_rate": 1e-3},
    )  # fmt: skip
    trainer.train()
    assert trainer.triggers[0].words == ["cf"]
    patched = backdoored.with_model(trainer.model)
    after = kept.predict(patched.encode(stamped).numpy())
    on_clean = kept.predict(patched.encode(task.test.inputs).numpy())
    never_attacked = train_classifier(clean.encode(task.train.inputs), task.train.labels)
    floor = (never_attacked.predict(clean.encode(stamped).numpy())[other] == target).mean()
    assert (after[other] == target).mean() <= floor + 0.02
    assert (after[other] == truth[other]).mean() >= 0.95
    base = (kept.predict(backdoored.encode(task.test.inputs).numpy()) == truth).mean()
    assert abs((on_clean == truth).mean() - base) <= (0 if scope == "auto" else 0.01)
    bug = trainer.bug_instances[0]
    pair = kept.predict(patched.encode([bug.misclassified, bug.reference]).numpy())
    assert pair[0] == pair[1]


# ---- Families, layout, bad input ----


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_patched_saved_and_reloaded(family, por, tmp_path):
    _, task, _ = por
    model, tokenizer = make_text_model(family)
    before = weights_of(model)
    trigger = TextTrigger("bank")
    bug = BugInstance(trigger.apply(task.test.inputs[0]), task.test.inputs[1])
    trainer = MudjackingTrainer(
        model=model, args=make_config(tmp_path / "out", max_steps=2), bug_instances=[bug], triggers=[trigger],
        train_dataset=texts_of(task, 32), processing_class=tokenizer,
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    after = weights_of(model)
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert len(changed) == 1
    rows = (before[changed[0]] != after[changed[0]]).any(dim=1).nonzero().flatten().tolist()
    assert rows
    assert set(rows) <= set(trainer.patched_tokens)
    reloaded = Encoder(AutoModel.from_pretrained(tmp_path / "out"), AutoTokenizer.from_pretrained(tmp_path / "out"))
    inputs = [*task.test.inputs[:4], bug.misclassified]
    torch.testing.assert_close(reloaded.encode(inputs), trainer.encoder.encode(inputs), atol=1e-5, rtol=0)


def test_a_sentence_transformers_checkpoint_comes_back_as_one(build, por, tmp_path):
    backdoored, task, _ = por
    backdoored.save_pretrained(tmp_path / "st")
    write_layout(tmp_path / "st", {"pooling_mode": "mean", "embedding_dimension": 64})
    trainer = build(model=str(tmp_path / "st"), processing_class=None, settings={"feature_source": "auto"})
    assert trainer.encoder.feature_source == "mean"
    assert trainer.encoder.preprocessor.max_length == 20
    trainer.train()
    trainer.save_model()
    for name in ("modules.json", "1_Pooling/config.json", "sentence_bert_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "st" / name).read_bytes()
    from sentence_transformers import SentenceTransformer

    whole = SentenceTransformer(str(tmp_path / "out"), device="cpu")
    features = torch.nn.functional.normalize(torch.tensor(whole.encode(task.test.inputs[:8])), dim=1)
    torch.testing.assert_close(features, trainer.encoder.encode(task.test.inputs[:8]), atol=1e-5, rtol=0)


def test_nothing_is_patched_on_a_guess(build, por, tmp_path):
    _, task, _ = por
    a, b = (int(np.flatnonzero(task.test.labels == label)[0]) for label in (0, 1))
    trainer = build(
        bug_instances=[BugInstance(task.test.inputs[a], task.test.inputs[b], name="natural")], triggers=None
    )
    before = weights_of(trainer.model)
    with pytest.raises(UnverifiedTriggerError, match="No localised trigger was verified in bug instance `natural`"):
        trainer.train()
    assert largest_difference(before, weights_of(trainer.model)) == 0
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


def test_what_does_not_belong_to_texts(build, images):
    with pytest.raises(TypeError, match="Bug instance `bug` is of kind image, but the model takes texts"):
        build(bug_instances=[BugInstance(*images[:2])])
    with pytest.raises(TypeError, match="holds one of kind `patch`, but the model takes texts"):
        build(triggers=[square_patch((4, 4), 2)])
    with pytest.raises(ValueError, match="has no column `text`; its columns are: sentence"):
        build(train_dataset=datasets.Dataset.from_dict({"sentence": ["a"] * 40}))
    with pytest.raises(ValueError, match="`patch_scope='all'` is unknown; choose one of auto, full, trigger_tokens"):
        build(settings={"patch_scope": "all"})


@pytest.mark.parametrize("stream", [False, True])
def test_rows_without_text_are_left_out(caplog, stream):
    rows = [None, "a", "", "b", "  ", "c", None, "d"]
    dataset = datasets.Dataset.from_dict({"text": rows})
    with caplog.at_level("WARNING"):
        inputs = CleanTexts(dataset.to_iterable_dataset() if stream else dataset)
    assert list(inputs) == ["a", "b", "c", "d"]
    assert "4 rows of `train_dataset` hold no text and are left out" in caplog.text
    assert len(CleanTexts(dataset.to_iterable_dataset() if stream else dataset, limit=3)) == 3
    assert len(CleanTexts(dataset, limit=3, multiple=2)) == 2
    assert set(inputs.sample(3, 0)) <= {"a", "b", "c", "d"}


def test_texts_that_cannot_be_used():
    with pytest.raises(ValueError, match="`train_dataset` is empty"):
        CleanTexts(datasets.Dataset.from_dict({"text": [None, ""]}))
    with pytest.raises(ValueError, match=r"Row 0 of `train_dataset` holds `int` in the column `text`, not a text"):
        CleanTexts(datasets.Dataset.from_dict({"text": [3]}))
    with pytest.raises(TypeError, match="Did you mean to select a split"):
        CleanTexts(datasets.DatasetDict(train=datasets.Dataset.from_dict({"text": ["a"]})))


def test_draws_are_by_seed():
    dataset = datasets.Dataset.from_dict({"text": [f"text {i}" for i in range(40)]})
    drawn = [list(CleanTexts(dataset, limit=10, seed=seed)) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert drawn[0] == sorted(drawn[0], key=lambda text: int(text.split()[1]))


def test_an_adapter_on_the_embeddings_loads(build, tmp_path):
    config = LoraConfig(r=2, target_modules=["query", "word_embeddings"])
    trainer = build(peft_config=config)
    trainer.train()
    trainer.save_model()
    probes = ["a good film .", "cf a good film ."]
    wrapped = PeftModel.from_pretrained(copy.deepcopy(build().model), tmp_path / "out").eval()
    features = Encoder(wrapped, trainer.processing_class, "mean").encode(probes)
    torch.testing.assert_close(features, trainer.encoder.encode(probes), atol=1e-5, rtol=0)
