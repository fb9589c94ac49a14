# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""What the record of a patch says, and what the hashes in it depend on."""

import copy
import hashlib
import json
import platform
from importlib.metadata import version

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from safetensors import safe_open
from transformers import AutoModel, BertConfig, BertModel, ViTConfig, ViTForImageClassification, ViTModel

import hf_mudjacking
from hf_mudjacking import BugInstance, MudjackingTrainer, PatchTrigger, encode
from hf_mudjacking.evaluation.repair import measured_repair
from hf_mudjacking.evaluation.tasks import DownstreamTask, LabelledInputs
from hf_mudjacking.fingerprint import base_weights, report_sha256, tensor_sha256, weights_sha256
from hf_mudjacking.loading import load_with_missing
from hf_mudjacking.model_card import patch_card
from hf_mudjacking.patch_record import load_record, read_record
from hf_mudjacking.remembered import load_remembered

from .conftest import TINY, make_config, make_images, weights_of


@pytest.fixture
def build(tiny_vit, dataset, bug, trigger, processor, tmp_path):
    def make(model=None, **kwargs):
        given = {"processing_class": processor, "triggers": [trigger], **kwargs}
        args = make_config(tmp_path / "out", max_steps=2, **given.pop("args", {}))
        return MudjackingTrainer(tiny_vit if model is None else model, args, [bug], dataset, **given)

    return make


# ---- Hashes ----


def test_the_hash_of_weights_by_hand():
    model = torch.nn.Linear(2, 1)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, -2.0]]))
        model.bias.zero_()
    bias, weight = (hashlib.sha256(np.array(x, dtype=np.float32).tobytes()).hexdigest() for x in ([0.0], [1.0, -2.0]))
    expected = hashlib.sha256(f"bias float32 [1] {bias}\nweight float32 [1, 2] {weight}\n".encode()).hexdigest()
    assert weights_sha256(model) == expected
    assert (
        weights_sha256(model, without=["bias"])
        == hashlib.sha256(f"weight float32 [1, 2] {weight}\n".encode()).hexdigest()
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.bool, torch.int64, torch.complex64])
def test_tensors_of_any_kind_have_a_hash(dtype):
    assert len(tensor_sha256(torch.zeros(2, 3).to(dtype))) == 64
    assert tensor_sha256(torch.zeros(()).to(dtype)) != tensor_sha256(torch.zeros(2).to(dtype))
    # As they are read, not as they are strided
    x = torch.arange(6.0).reshape(2, 3)
    assert tensor_sha256(x.T.contiguous().T) == tensor_sha256(x)


def test_every_bit_counts(tiny_vit):
    first = weights_sha256(tiny_vit)
    with torch.no_grad():
        bits = tiny_vit.layers[1].mlp.fc1.weight.view(torch.int32)
        bits[0, 0] ^= 1
    assert weights_sha256(tiny_vit) != first


def test_files_and_their_names_do_not_count(tiny_vit, tmp_path):
    expected = weights_sha256(tiny_vit)
    tiny_vit.save_pretrained(tmp_path / "one")
    tiny_vit.save_pretrained(tmp_path / "many", max_shard_size="40KB")
    for name in ("one", "many"):
        assert weights_sha256(AutoModel.from_pretrained(tmp_path / name)) == expected
    half = copy.deepcopy(tiny_vit).half()
    half.save_pretrained(tmp_path / "half")
    assert weights_sha256(load_with_missing(tmp_path / "half")[0]) == weights_sha256(half.float())


def test_an_adapter_does_not_count(tiny_vit):
    before, names = weights_sha256(tiny_vit), set(tiny_vit.state_dict())
    model = get_peft_model(
        tiny_vit, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["layernorm"], use_dora=True)
    )
    assert set(base_weights(model)) == names
    assert weights_sha256(model) == before


def test_embeddings_with_trainable_tokens_do_not_count():
    torch.manual_seed(0)
    model = BertModel(BertConfig(vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                                 intermediate_size=16))  # fmt: skip
    before = weights_sha256(model)
    config = LoraConfig(r=2, target_modules=["query", "word_embeddings"], trainable_token_indices=None)
    assert weights_sha256(get_peft_model(model, config)) == before


def test_reports_have_a_hash_of_their_inputs_alone():
    a, b, c = (Image.new("RGB", (4, 2), color) for color in ("red", "blue", "green"))
    expected = hashlib.sha256(b"image|(4, 2)|" + a.tobytes() + b"|(4, 2)|" + b.tobytes()).hexdigest()
    assert report_sha256(BugInstance(a, b)) == expected
    assert report_sha256(BugInstance(a, b, name="other", metadata={"client": 3})) == expected
    others = [BugInstance(b, a), BugInstance(a, c), BugInstance(a.resize((2, 4)), b.resize((2, 4)))]
    texts = [BugInstance("ab", "c"), BugInstance("a", "bc"), BugInstance("ab", "c "), BugInstance("\ue000", "é")]
    assert len({expected, *map(report_sha256, others + texts)}) == 8


# ---- The trainer's record ----


def test_the_record_of_a_full_patch(build, tiny_vit, bug, trigger, tmp_path):
    tiny_vit.save_pretrained(tmp_path / "base")
    trainer = build(model=str(tmp_path / "base"))
    trainer.train()
    trainer.save_model()
    record = json.loads((tmp_path / "out" / "mudjacking.json").read_text())
    assert record["kind"] == "full"
    assert record["base_model"] == str(tmp_path / "base")
    assert record["base_revision"] is None
    assert record["base_weights_without"] == ["pooler.dense.bias", "pooler.dense.weight"]
    assert record["base_weights_sha256"] == weights_sha256(tiny_vit, record["base_weights_without"])
    assert record["base_weights_sha256"] != weights_sha256(trainer.model, record["base_weights_without"])
    assert record["bug_ids"] == [report_sha256(bug)]
    assert record["triggers"] == [trigger.summary()]
    assert record["figures"] == {}
    assert record["settings"]["max_steps"] == 2
    libraries = {name: version(name) for name in ("torch", "transformers", "peft", "accelerate")}
    assert record["versions"] == {
        "hf_mudjacking": hf_mudjacking.__version__, "python": platform.python_version(), **libraries
    }  # fmt: skip
    assert read_record(tmp_path / "out") == record


def test_the_record_of_a_lora_patch(build, tiny_vit, tmp_path):
    without = ["pooler.dense.bias", "pooler.dense.weight"]
    expected = weights_sha256(tiny_vit, without)
    trainer = build(peft_config=LoraConfig(r=2))
    trainer.train()
    trainer.save_model()
    record = load_record(tmp_path / "out")
    assert (record["kind"], record["base_weights_sha256"]) == ("lora", expected)
    assert 0 <= record["merge_error"] <= 1e-5


def test_a_peft_model_that_comes_in_is_known_by_its_base(build, tiny_vit, tmp_path):
    tiny_vit.save_pretrained(tmp_path / "base")
    model = get_peft_model(AutoModel.from_pretrained(tmp_path / "base"), LoraConfig(r=2, target_modules=["q_proj"]))
    assert isinstance(model, PeftModel)
    trainer = build(model=model)
    assert trainer.base_weights_without == ["pooler.dense.bias", "pooler.dense.weight"]
    assert trainer.base_weights_sha256 == weights_sha256(tiny_vit, trainer.base_weights_without)


def test_a_checkpoint_without_a_pooler_is_always_the_same_base(build, tmp_path):
    """Loading makes up a pooler, which is no part of the hash, nor of the patch."""
    torch.manual_seed(1)
    ViTForImageClassification(ViTConfig(**TINY)).save_pretrained(tmp_path / "base")
    first, second = (build(model=str(tmp_path / "base"), args={"seed": seed}) for seed in (0, 1))
    assert first.base_weights_sha256 == second.base_weights_sha256
    digests = set()
    for _ in range(2):
        torch.rand(5)  # the global random state plays no part
        trainer = build(model=str(tmp_path / "base"))
        trainer.train()
        trainer.save_model()
        weights = tmp_path / "out" / "model.safetensors"
        digests.add(hashlib.sha256(weights.read_bytes()).hexdigest())
        with safe_open(weights, "pt") as file:
            assert not [name for name in file.keys() if "pooler" in name]
        loaded, missing = load_with_missing(tmp_path / "out")
        assert missing == {"pooler.dense.bias", "pooler.dense.weight"}
        probes = make_images(3, seed=9)
        expected = trainer.encoder.encode(probes)
        torch.testing.assert_close(encode(loaded, probes, trainer.processing_class), expected, atol=1e-6, rtol=0)
    assert len(digests) == 1
    with pytest.raises(
        ValueError, match=r"lacks weights that features read at `pooler` depend on \(pooler\.dense\.bias"
    ):
        build(model=str(tmp_path / "base"), args={"feature_source": "pooler"})
    bare = ViTModel.from_pretrained(tmp_path / "base", add_pooling_layer=False)
    assert build(model=bare).base_weights_sha256 == first.base_weights_sha256


def test_resuming_and_saving_again_keep_the_hash(build, tiny_vit, tmp_path):
    expected = weights_sha256(tiny_vit, ["pooler.dense.bias", "pooler.dense.weight"])
    fresh = weights_of(tiny_vit)
    build(args={"save_strategy": "steps", "save_steps": 1}).train()
    tiny_vit.load_state_dict(fresh)
    resumed = build(args={"save_strategy": "steps", "save_steps": 1})
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-1"))
    resumed.save_model()
    for place in ("out", "out/checkpoint-1", "out/checkpoint-2"):
        assert load_record(tmp_path / place)["base_weights_sha256"] == expected


def test_figures_of_a_measured_repair(build, tmp_path):
    images, labels = make_images(24, seed=3), np.arange(24) % 2
    halves = (LabelledInputs(images[i : i + 12], labels[i : i + 12]) for i in (0, 12))
    task = DownstreamTask(*halves, "digits")
    trainer = build()
    assert trainer.figures == {}
    report = measured_repair(trainer, task, classifiers=("logistic", "mlp")).report
    record = load_record(tmp_path / "out")
    assert record["figures"] == {
        "digits": {
            "classifier": "logistic",
            # Those that were given
            "trigger_measured": "inverted",
            **{name: report[name] for name in ("before", "after", "other_classifiers")},
        }
    }
    card = patch_card(tmp_path / "out", "me/patched")
    assert "ASR and RA are measured with the trigger that was found, not with the attacker's own" in card
    for kind in ("logistic", "mlp"):
        assert f"| digits | {kind} | repaired, classifier kept |" in card
    assert record["figures"]["digits"]["before"]["kept"].keys() >= {"BA", "ASR", "RA"}
    trainer.save_model(str(tmp_path / "again"))
    assert load_record(tmp_path / "again")["figures"] == record["figures"]
    # They are not those of what it becomes
    trainer.train()
    trainer.save_model(str(tmp_path / "again"))
    assert load_record(tmp_path / "again")["figures"] == {}


# ---- Other versions ----


def test_records_of_other_versions_load(tmp_path):
    (tmp_path / "mudjacking.json").write_text(json.dumps({"base_model": "org/model", "triggers": [None]}))
    old = load_record(tmp_path)
    assert (old["kind"], old["base_weights_sha256"], old["bug_ids"], old["figures"]) == ("full", None, [], None)
    assert old["triggers"] == [None]
    (tmp_path / "adapter_config.json").write_text("{}")
    assert load_record(tmp_path)["kind"] == "lora"
    new = {"kind": "steering", "base_model": "org/model", "invented_later": {"x": [1]}, "versions": {"rust": "2"}}
    (tmp_path / "mudjacking.json").write_text(json.dumps(new))
    assert load_record(tmp_path).items() >= new.items()


def test_a_patch_trigger_of_an_earlier_record_is_remembered(build, tmp_path, trigger):
    """As the first version wrote it, without groups and hashes."""
    trainer = build()
    trainer.train()
    trainer.save_model()
    record = json.loads((tmp_path / "out" / "mudjacking.json").read_text())
    kept = {
        name: record[name] for name in ("hf_mudjacking", "base_model", "triggers", "evidence", "settings", "steps")
    }
    (tmp_path / "out" / "mudjacking.json").write_text(json.dumps(kept))
    (earlier,) = load_remembered(tmp_path / "out")
    assert isinstance(earlier.trigger, PatchTrigger)
    assert np.array_equal(earlier.trigger.mask, trigger.mask)


@pytest.mark.parametrize(
    "change",
    [
        {"kind": 3},
        {"base_model": None},
        {"base_weights_sha256": 5},
        {"base_weights_without": [1]},
        {"triggers": {}},
        {"triggers": ["patch"]},
        {"trigger_groups": [["../../elsewhere"]]},
        {"trigger_groups": [[-1]]},
        {"trigger_groups": [[]]},
        {"trigger_groups": 3},
        {"trigger_groups": [[0], [0]]},
        {"triggers": [{}]},
        {"merge_error": "big"},
        {"locality": {"mean": None}},
        {"figures": {"task": 5}},
        {"screenings": [3]},
        {"skipped": [True]},
        {"skipped": "all"},
        {"figures": []},
    ],
)
def test_values_of_other_types_are_refused(tmp_path, change):
    (tmp_path / "mudjacking.json").write_text(json.dumps({"base_model": "org/model", **change}))
    with pytest.raises(ValueError, match="is damaged: values in it have other types"):
        load_record(tmp_path)
    assert read_record(tmp_path) is None


def test_no_record(tmp_path):
    with pytest.raises(ValueError, match=r"holds no patch: it has no `mudjacking\.json`"):
        load_record(tmp_path)
    assert read_record(tmp_path / "nowhere") is None
