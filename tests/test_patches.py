# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""Patches as they are handed on: full weights, adapter and delta, applied, taken back and compared, on files."""

import copy
import hashlib
import json
import shutil

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModel, ViTForImageClassification, ViTModel

from hf_mudjacking import BugInstance, MudjackingTrainer, encode
from hf_mudjacking.cli import main
from hf_mudjacking.delta import DELTA_FILE, Delta, DeltaError, write_delta
from hf_mudjacking.differences import ModelDifference, compare_models, compare_tensors, difference_table
from hf_mudjacking.fingerprint import weights_sha256
from hf_mudjacking.output import read_record
from hf_mudjacking.patches import WrongBaseError, apply_patch, compared, revert_patch, save_delta
from hf_mudjacking.published import published_record
from hf_mudjacking.triggers import square_patch
from hf_mudjacking.weight_files import WeightFiles

from .conftest import largest_difference, make_config, make_dataset, make_images, weights_of


def _hashes(folder):
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in folder.rglob("*")
        if p.is_file()
    }


def _tensors(folder):
    return {
        name: tensor for path in sorted(folder.glob("model*.safetensors")) for name, tensor in load_file(path).items()
    }


def _same_bits(a, b):
    assert a.keys() == b.keys()
    return all(a[n].dtype == b[n].dtype and a[n].numpy().tobytes() == b[n].numpy().tobytes() for n in a)


@pytest.fixture(scope="module")
def folders(_tiny_vit, processor, trigger_and_bug, dataset_of_eight, tmp_path_factory):
    """A model on disk, and a full and a LoRA patch of it, really trained for three steps."""
    root = tmp_path_factory.mktemp("patches")
    _tiny_vit.save_pretrained(root / "base")
    processor.save_pretrained(root / "base")
    trigger, bug = trigger_and_bug
    for kind, lora in (("full", None), ("lora", LoraConfig(r=4, lora_alpha=8))):
        args = make_config(root / kind, max_steps=3, learning_rate=1e-2)
        trainer = MudjackingTrainer(
            str(root / "base"), args, [bug], dataset_of_eight, peft_config=lora, triggers=[trigger]
        )
        trainer.train()
        trainer.save_model()
    save_delta(root / "base", root / "full", root / "delta")
    return root


@pytest.fixture(scope="module")
def trigger_and_bug():
    trigger = square_patch((16, 16), 4)
    x_b, x_r = make_images(2, seed=100)
    return trigger, BugInstance(trigger.apply(x_b), x_r)


@pytest.fixture(scope="module")
def dataset_of_eight():
    return make_dataset(make_images(8))


def _edited(folders, place):
    """The model with one tensor changed by hand."""
    model = AutoModel.from_pretrained(folders / "base")
    with torch.no_grad():
        model.layernorm.bias.add_(1)
    model.save_pretrained(place)
    return place


@pytest.fixture
def images():
    return make_images(4, seed=9)


# ---- Apply ----


@pytest.mark.parametrize("kind", ["full", "delta"])
def test_applying_gives_the_patched_model_to_the_last_bit(folders, tmp_path, kind):
    before = _hashes(folders)
    record = apply_patch(folders / kind, folders / "base", tmp_path / "out")
    assert _same_bits(_tensors(tmp_path / "out"), _tensors(folders / "full"))
    assert not _same_bits(_tensors(tmp_path / "out"), _tensors(folders / "base"))
    assert _hashes(folders) == before, "neither model nor patch is written to"
    assert record["kind"] == read_record(tmp_path / "out")["kind"] == "full"
    for name in ("config.json", "preprocessor_config.json", "_triggers/0/trigger.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (folders / "full" / name).read_bytes()
    assert not (tmp_path / "out" / "base_config.json").exists()


def test_a_lora_patch_is_merged(folders, tmp_path, images):
    apply_patch(folders / "lora", folders / "base", tmp_path / "out")
    merged = AutoModel.from_pretrained(tmp_path / "out")
    assert type(merged) is ViTModel
    adapted = PeftModel.from_pretrained(AutoModel.from_pretrained(folders / "base"), folders / "lora")
    expected = encode(adapted, images, _processor(folders))
    assert not (tmp_path / "out" / "adapter_config.json").exists()
    torch.testing.assert_close(encode(str(tmp_path / "out"), images), expected, atol=1e-5, rtol=0)
    original = encode(str(folders / "base"), images)
    assert (expected - original).abs().max() > 1e-3


def test_a_merged_patch_has_no_weights_that_its_base_lacks(folders, trigger_and_bug, dataset_of_eight, tmp_path):
    """Loading makes up a pooler, which would pass for a trained one."""
    trigger, bug = trigger_and_bug
    base = AutoModel.from_pretrained(folders / "base", add_pooling_layer=False)
    base.save_pretrained(tmp_path / "base")
    _processor(folders).save_pretrained(tmp_path / "base")
    args = make_config(tmp_path / "lora", max_steps=3)
    lora = LoraConfig(r=2, target_modules=["q_proj"])
    trainer = MudjackingTrainer(
        str(tmp_path / "base"), args, [bug], dataset_of_eight, peft_config=lora, triggers=[trigger]
    )
    trainer.train()
    trainer.save_model()
    apply_patch(tmp_path / "lora", tmp_path / "base", tmp_path / "merged")
    assert _tensors(tmp_path / "merged").keys() == _tensors(tmp_path / "base").keys()
    save_delta(tmp_path / "base", tmp_path / "lora", tmp_path / "delta")
    apply_patch(tmp_path / "delta", tmp_path / "base", tmp_path / "from_delta")
    assert _same_bits(_tensors(tmp_path / "from_delta"), _tensors(tmp_path / "merged"))
    assert compare_models(tmp_path / "base", tmp_path / "lora").only_second == []
    # What was repaired is remembered when the whole is repaired anew
    again = MudjackingTrainer(
        str(tmp_path / "merged"), make_config(tmp_path / "again"), [bug], dataset_of_eight, triggers=[trigger]
    )
    assert len(again.remembered) == 1


def test_an_adapter_that_changed_the_weights_under_it_is_merged(
    folders, trigger_and_bug, dataset_of_eight, images, tmp_path
):
    """PiSSA starts from the largest singular vectors, which it takes out of the weights."""
    trigger, bug = trigger_and_bug
    lora = LoraConfig(r=2, init_lora_weights="pissa", target_modules=["q_proj", "v_proj"])
    trainer = MudjackingTrainer(
        str(folders / "base"), make_config(tmp_path / "lora", max_steps=2), [bug], dataset_of_eight, peft_config=lora,
        triggers=[trigger],
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    apply_patch(tmp_path / "lora", folders / "base", tmp_path / "merged")
    merged = encode(str(tmp_path / "merged"), images)
    torch.testing.assert_close(merged, trainer.encoder.encode(images), atol=1e-5, rtol=0)


@pytest.mark.parametrize("write", [apply_patch, lambda patch, base, out: save_delta(base, patch, out)])
def test_an_adapter_that_merging_changes_stays_one(folders, tmp_path, write):
    shutil.copytree(folders / "lora", tmp_path / "lora")
    record = read_record(tmp_path / "lora")
    (tmp_path / "lora" / "mudjacking.json").write_text(json.dumps({**record, "merge_error": 1e-2}))
    with pytest.raises(ValueError, match=r"would change features by up to 0\.01, by its record"):
        write(tmp_path / "lora", folders / "base", tmp_path / "out")


def test_an_adapter_may_be_kept(folders, tmp_path, images, monkeypatch):
    monkeypatch.chdir(folders)
    apply_patch("lora", "base", tmp_path / "out", keep_adapter=True)
    monkeypatch.chdir(tmp_path)
    for place in (folders / "lora", tmp_path / "out"):
        assert json.loads((place / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
            folders / "base"
        )
    assert not list((tmp_path / "out").glob("model*"))
    adapted = PeftModel.from_pretrained(AutoModel.from_pretrained(folders / "base"), folders / "lora")
    expected = encode(adapted, images, _processor(folders))
    # It names the model that it was applied to, so it loads by itself
    torch.testing.assert_close(encode(str(tmp_path / "out"), images), expected, atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="kind `full`; only a LoRA patch"):
        apply_patch(folders / "full", folders / "base", tmp_path / "other", keep_adapter=True)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("kind", ["full", "lora", "delta"])
def test_another_base_is_refused_with_both_hashes(folders, tmp_path, kind, capsys):
    other = AutoModel.from_pretrained(folders / "base")
    with torch.no_grad():
        other.layers[1].mlp.fc1.bias[3] += 1e-6
    other.save_pretrained(tmp_path / "other")
    code = main(["apply", str(folders / kind), "--to", str(tmp_path / "other"), "--output-dir", str(tmp_path / "out")])
    error = capsys.readouterr().err
    assert code == 2
    assert read_record(folders / kind)["base_weights_sha256"] in error
    assert "Its weights have the sha256" in error
    assert not (tmp_path / "out").exists()


def test_the_same_weights_in_other_files_are_the_same_base(folders, tmp_path):
    """In two shards; and as a classifier, whose file has other names and a head, and no pooler."""
    model = AutoModel.from_pretrained(folders / "base")
    model.save_pretrained(tmp_path / "shards", max_shard_size="60KB")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 1
    classifier = ViTForImageClassification(model.config)
    classifier.vit.load_state_dict(model.state_dict(), strict=False)
    classifier.save_pretrained(tmp_path / "classifier")
    assert "vit.layernorm.weight" in _tensors(tmp_path / "classifier")
    wanted = _tensors(folders / "full")
    for name in ("shards", "classifier"):
        for kind in ("full", "delta"):
            apply_patch(folders / kind, tmp_path / name, tmp_path / f"{name}-{kind}")
            got = _tensors(tmp_path / f"{name}-{kind}")
            # The pooler rests while patching, and the classifier has none
            assert got.keys() == wanted.keys() - (
                {"pooler.dense.weight", "pooler.dense.bias"} if len(got) < 40 else set()
            )
            assert _same_bits(got, {n: wanted[n] for n in got})
    assert json.loads((tmp_path / "shards-delta" / "model.safetensors.index.json").read_text())["weight_map"]
    assert isinstance(AutoModel.from_pretrained(tmp_path / "shards-delta"), ViTModel)


def test_output_folders_that_are_not_written_to(folders, tmp_path):
    before = _hashes(folders)
    for out in (folders / "base", folders / "delta", folders):
        with pytest.raises(ValueError, match="is or contains"):
            apply_patch(folders / "delta", folders / "base", out)
    (tmp_path / "model.safetensors").write_text("mine")
    with pytest.raises(ValueError, match="holds another model"):
        apply_patch(folders / "delta", folders / "base", tmp_path)
    assert (tmp_path / "model.safetensors").read_text() == "mine"
    with pytest.raises(ValueError, match="is not empty"):
        revert_patch(folders / "full", folders / "delta", tmp_path)
    assert _hashes(folders) == before


def test_an_error_half_way_leaves_nothing(folders, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_mudjacking.patches.write_json", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        apply_patch(folders / "full", folders / "base", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_patch_in_the_cache_of_the_hub(folders, tmp_path, monkeypatch):
    """As `snapshot_download` leaves it: every file is a link to a blob."""
    cache = tmp_path / "cache"
    repo = cache / "models--org--repair"
    snapshot = repo / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir()
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("a" * 40)
    for path in (folders / "delta").iterdir():
        if path.is_file():
            shutil.copyfile(path, repo / "blobs" / path.name)
            (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    apply_patch("org/repair", folders / "base", tmp_path / "out")
    assert _same_bits(_tensors(tmp_path / "out"), _tensors(folders / "full"))
    with pytest.raises(ValueError, match="`org/nothing` is no folder, and it could not be had from the Hub"):
        apply_patch("org/nothing", folders / "base", tmp_path / "other")


# ---- Revert ----


@pytest.mark.parametrize("kind", ["full", "lora", "delta"])
def test_reverting_gives_the_base_to_the_last_bit(folders, tmp_path, kind):
    apply_patch(folders / kind, folders / "base", tmp_path / "patched")
    before = _hashes(folders)
    revert_patch(tmp_path / "patched", folders / kind, tmp_path / "back")
    assert _same_bits(_tensors(tmp_path / "back"), _tensors(folders / "base"))
    assert _hashes(folders) == before
    assert (tmp_path / "back" / "config.json").read_bytes() == (folders / "base" / "config.json").read_bytes()
    assert read_record(tmp_path / "back") is None, "it is no patch"


def test_a_base_that_was_moved(folders, tmp_path):
    shutil.copytree(folders, tmp_path / "all")
    for kind in ("full", "delta"):
        path = tmp_path / "all" / kind / "mudjacking.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "base_model": str(tmp_path / "nowhere")}))
    patch = tmp_path / "all" / "full"
    with pytest.raises(ValueError, match="If the base was moved, say where it is"):
        revert_patch(patch, patch, tmp_path / "out")
    with pytest.raises(WrongBaseError, match="is not the model that"):
        revert_patch(patch, patch, tmp_path / "out", folders / "full")
    assert not (tmp_path / "out").exists()
    assert main(["revert", str(patch), "--patch", str(patch), "--base-model", str(folders / "base"),
                 "--output-dir", str(tmp_path / "out")]) == 0  # fmt: skip
    assert _same_bits(_tensors(tmp_path / "out"), _tensors(folders / "base"))


def test_a_delta_is_not_taken_back_from_another_model(folders, tmp_path):
    with pytest.raises(DeltaError, match="is not the tensor that"):
        revert_patch(folders / "base", folders / "delta", tmp_path / "out")
    # A tensor that the delta does not change is covered by the hash of the whole
    edited = _edited(folders, tmp_path / "edited")
    save_delta(folders / "base", edited, tmp_path / "delta")
    tensors = _tensors(edited)
    tensors["layernorm.weight"][0] += 1e-6
    save_file(tensors, edited / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WrongBaseError, match="is not the model that"):
        revert_patch(edited, tmp_path / "delta", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_base_that_has_changed_since_is_not_handed_out(folders, tmp_path):
    shutil.copytree(folders, tmp_path / "all")
    record = json.loads((folders / "full" / "mudjacking.json").read_text())
    record["base_model"] = str(tmp_path / "all" / "base")
    for kind in ("full", "lora"):
        (tmp_path / "all" / kind / "mudjacking.json").write_text(json.dumps({**record, "kind": kind}))
    tensors = _tensors(folders / "base")
    tensors["layernorm.bias"] += 1
    save_file(tensors, tmp_path / "all" / "base" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WrongBaseError, match="is not the model that"):
        revert_patch(tmp_path / "all" / "full", tmp_path / "all" / "lora", tmp_path / "out")
    (tmp_path / "all" / "full" / "mudjacking.json").write_text(json.dumps({**record, "base_weights_sha256": "0" * 64}))
    with pytest.raises(WrongBaseError, match="was not made with"):
        revert_patch(tmp_path / "all" / "full", tmp_path / "all" / "lora", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---- Delta ----


def _write(folder, **tensors):
    folder.mkdir(exist_ok=True)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return WeightFiles(folder)


def test_a_few_rows_are_stored_as_rows(tmp_path):
    a = torch.randn(1000, 8)
    b = a.clone()
    b[[3, 977]] += 1
    changes = write_delta(tmp_path / DELTA_FILE, _write(tmp_path / "a", w=a, v=a), _write(tmp_path / "b", w=b, v=a))
    assert list(changes) == ["w"]
    assert changes["w"].sparse
    stored = load_file(tmp_path / DELTA_FILE)
    assert stored["rows:w"].tolist() == [3, 977]
    assert stored["xor:w"].shape == (2, 8)
    expected = a[[3, 977]].numpy().view(np.int32) ^ b[[3, 977]].numpy().view(np.int32)
    assert np.array_equal(stored["xor:w"].numpy(), expected)
    assert (tmp_path / DELTA_FILE).stat().st_size < 1000


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool]
)
def test_there_and_back_in_every_dtype(tmp_path, dtype):
    torch.manual_seed(0)
    a, b = ((torch.randn(6, 4) * 3).to(dtype) for _ in range(2))
    c = torch.randn(5, 3)
    special = torch.tensor([0.0, float("nan"), float("inf"), 1.0])
    other = torch.tensor([-0.0, 1.0, float("nan"), 1.0])
    first = _write(tmp_path / "a", w=a, c=c, s=special, gone=a, scalar=torch.tensor(1.5))
    second = _write(tmp_path / "b", w=b, c=c, s=other, new=b, scalar=torch.tensor(2.5))
    write_delta(tmp_path / DELTA_FILE, first, second)
    delta = Delta(tmp_path)
    assert delta.fits(first)
    assert not delta.fits(second)
    for name in ("there", "back"):
        (tmp_path / name).mkdir()
    delta.apply(first, tmp_path / "there")
    there = WeightFiles(tmp_path / "there")
    delta.apply(there, tmp_path / "back", back=True)
    for got, wanted in ((there, second), (WeightFiles(tmp_path / "back"), first)):
        assert got.names == wanted.names
        for name in wanted.names:
            assert got[name].dtype == wanted[name].dtype
            assert torch.equal(got[name].flatten().view(torch.uint8), wanted[name].flatten().view(torch.uint8))


def test_a_base_in_half_precision(tmp_path):
    """Models are patched in float32 whatever the checkpoint's dtype; the way back ends in the checkpoint's."""
    torch.manual_seed(0)
    a = torch.randn(6, 4).half()
    first, second = _write(tmp_path / "a", w=a), _write(tmp_path / "b", w=a.float() + 1e-4)
    write_delta(tmp_path / DELTA_FILE, first, second)
    for name in ("there", "back"):
        (tmp_path / name).mkdir()
    Delta(tmp_path).apply(first, tmp_path / "there")
    assert torch.equal(WeightFiles(tmp_path / "there")["w"], second["w"])
    Delta(tmp_path).apply(second, tmp_path / "back", back=True)
    assert WeightFiles(tmp_path / "back")["w"].dtype == torch.float16
    assert torch.equal(WeightFiles(tmp_path / "back")["w"], a)
    with pytest.raises(DeltaError, match="only between tensors of one shape, from a narrower"):
        write_delta(tmp_path / "other", second, first)


def test_a_half_precision_checkpoint_whole(folders, tmp_path, trigger_and_bug, dataset_of_eight):
    AutoModel.from_pretrained(folders / "base", dtype=torch.float16).save_pretrained(tmp_path / "half")
    shutil.copyfile(folders / "base" / "preprocessor_config.json", tmp_path / "half" / "preprocessor_config.json")
    trigger, bug = trigger_and_bug
    args = make_config(tmp_path / "patched", max_steps=1, learning_rate=1e-2)
    trainer = MudjackingTrainer(str(tmp_path / "half"), args, [bug], dataset_of_eight, triggers=[trigger])
    trainer.train()
    trainer.save_model()
    record = save_delta(tmp_path / "half", tmp_path / "patched", tmp_path / "delta")
    assert record["bug_ids"], "the record of the patch is carried on"
    apply_patch(tmp_path / "delta", tmp_path / "half", tmp_path / "again")
    assert _same_bits(_tensors(tmp_path / "again"), _tensors(tmp_path / "patched"))
    revert_patch(tmp_path / "again", tmp_path / "delta", tmp_path / "back")
    assert _same_bits(_tensors(tmp_path / "back"), _tensors(tmp_path / "half"))
    assert AutoModel.from_pretrained(tmp_path / "back").dtype == torch.float16


def test_no_difference_is_no_delta(folders, tmp_path):
    with pytest.raises(DeltaError, match="have the same weights"):
        save_delta(folders / "base", folders / "base", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_delta_of_models_that_no_trainer_made(folders, tmp_path):
    record = save_delta(folders / "base", _edited(folders, tmp_path / "edited"), tmp_path / "delta")
    assert record["base_weights_sha256"] == weights_sha256(AutoModel.from_pretrained(folders / "base"))
    assert record["kind"] == "delta"
    assert record["base_model"] == str(folders / "base")
    assert set(Delta(tmp_path / "delta").changes) == {"layernorm.bias"}
    assert (tmp_path / "delta" / DELTA_FILE).stat().st_size < 1500
    apply_patch(tmp_path / "delta", folders / "base", tmp_path / "out")
    assert _same_bits(_tensors(tmp_path / "out"), _tensors(tmp_path / "edited"))


def test_a_lora_patch_as_a_delta(folders, tmp_path):
    save_delta(folders / "base", folders / "lora", tmp_path / "delta")
    apply_patch(tmp_path / "delta", folders / "base", tmp_path / "from_delta")
    apply_patch(folders / "lora", folders / "base", tmp_path / "from_lora")
    assert _same_bits(_tensors(tmp_path / "from_delta"), _tensors(tmp_path / "from_lora"))
    adapted = set(Delta(tmp_path / "delta").changes)
    assert adapted
    assert all(name.endswith("weight") for name in adapted)


# ---- Diff ----


def test_a_lora_patch_of_another_model_makes_no_delta(folders, tmp_path):
    other = _edited(folders, tmp_path / "other")
    with pytest.raises(WrongBaseError, match="is not the model that"):
        save_delta(other, folders / "lora", tmp_path / "delta")
    with pytest.raises(ValueError, match="is an adapter; a delta leads from a model to another"):
        save_delta(folders / "lora", folders / "full", tmp_path / "delta")
    assert not (tmp_path / "delta").exists()


def test_figures_of_another_patch_do_not_stay(folders, tmp_path):
    """A report lies beside a patch; what is applied into that folder is another one."""
    apply_patch(folders / "full", folders / "base", tmp_path / "out")
    (tmp_path / "out" / "report.json").write_text('{"after": {"BA": 0.99}}')
    save_delta(folders / "base", _edited(folders, tmp_path / "other"), tmp_path / "delta")
    apply_patch(tmp_path / "delta", folders / "base", tmp_path / "out")
    assert published_record(tmp_path / "out", None)["figures"] == {}
    assert not (tmp_path / "out" / "report.json").exists()


def test_weights_that_would_load_differently_are_refused(folders, tmp_path):
    both = tmp_path / "both"
    shutil.copytree(folders / "base", both)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copyfile(folders / "lora" / name, both / name)
    with pytest.raises(ValueError, match="holds a model with an adapter beside it"), compared(folders / "base", both):
        pass
    shutil.copytree(folders / "base", tmp_path / "named")
    config = json.loads((tmp_path / "named" / "config.json").read_text())
    (tmp_path / "named" / "config.json").write_text(json.dumps({**config, "transformers_weights": "x.safetensors"}))
    with (
        pytest.raises(ValueError, match="names the file of its weights"),
        compared(folders / "base", tmp_path / "named"),
    ):
        pass


def test_shapes_that_do_not_fit_the_configuration(folders, tmp_path, capsys):
    shutil.copytree(folders / "base", tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps({**config, "intermediate_size": 77}))
    options = ["--to", str(tmp_path / "base"), "--output-dir", str(tmp_path / "out")]
    assert main(["apply", str(folders / "delta"), *options]) == 2
    assert "No model could be loaded from" in capsys.readouterr().err


def test_an_adapter_of_others_whose_base_was_moved(folders, tmp_path):
    shutil.copytree(folders / "lora", tmp_path / "lora")
    (tmp_path / "lora" / "mudjacking.json").unlink()
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    (tmp_path / "lora" / "adapter_config.json").write_text(
        json.dumps({**config, "base_model_name_or_path": str(tmp_path / "gone")})
    )
    with pytest.raises(ValueError, match=r"is not there any more.*`base_model_name_or_path` in its"):
        encode(str(tmp_path / "lora"), make_images(1))


@pytest.mark.parametrize("architectures", [[5], [["x"]], {"a": 1}, ["PreTrainedModel"], []])
def test_damaged_names_of_a_class(folders, tmp_path, architectures):
    shutil.copytree(folders / "base", tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps({**config, "architectures": architectures}))
    told = ""
    try:
        encode(str(tmp_path / "base"), make_images(1))
    except ValueError as error:
        told = str(error)
    assert not told or "No model could be loaded" in told


def test_an_adapter_whose_base_was_moved_says_how_it_is_found(folders, tmp_path):
    shutil.copytree(folders / "lora", tmp_path / "lora")
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    (tmp_path / "lora" / "adapter_config.json").write_text(
        json.dumps({**config, "base_model_name_or_path": str(tmp_path / "gone")})
    )
    with pytest.raises(ValueError, match=r"is an adapter of `.*gone`, which is not there any more.*--keep-adapter"):
        encode(str(tmp_path / "lora"), make_images(1))


def test_differences_by_hand():
    a = torch.tensor([[3.0, 4.0], [0.0, float("nan")]])
    b = torch.tensor([[3.0, 4.5], [-0.0, float("nan")]])
    difference = compare_tensors("w", a[:, :1], a[:, :1].clone())
    assert difference is None
    assert compare_tensors("w", torch.zeros(2), torch.tensor([0.0, -2.0])).relative is None
    difference = compare_tensors("w", a[0], b[0])
    assert difference.relative == pytest.approx(0.1)
    assert difference.largest == pytest.approx(0.5)
    assert difference.share == 0.5
    assert compare_tensors("w", a, b).share == 0.25


def test_differences_that_are_not_finite():
    """`max` overlooks NaN, and json has none."""
    x = torch.tensor([1.0, float("-inf"), 3.0])
    assert compare_tensors("w", x, x.clone()) is None
    for bad in (float("nan"), float("inf")):
        difference = compare_tensors("w", torch.ones(3), torch.tensor([1.0, bad, 2.0]))
        assert (difference.relative, difference.largest) == (None, None)
        assert difference.share == pytest.approx(2 / 3)
        table = difference_table(ModelDifference(1, [difference], [], []))
        assert list(table.columns[3].cells) == ["not finite"]
    moved = compare_tensors("w", x, torch.tensor([2.0, float("-inf"), 3.0]))
    assert (moved.largest, moved.relative) == (1.0, 0.0)


def test_diff_prints_and_writes(folders, tmp_path, capsys):
    code = main(["diff", str(folders / "base"), str(folders / "full"), "--json", str(tmp_path / "diff.json")])
    assert code == 0
    content = json.loads((tmp_path / "diff.json").read_text())
    a, b = _tensors(folders / "base"), _tensors(folders / "full")
    moved = {name for name in a if not torch.equal(a[name], b[name])}
    assert {entry["name"] for entry in content["changed"]} == moved
    assert content["tensors"] == len(a)
    assert content["only_first"] == content["only_second"] == []
    entry = next(entry for entry in content["changed"] if entry["relative"] is not None)
    x, y = a[entry["name"]].double(), b[entry["name"]].double()
    assert entry["relative"] == pytest.approx(float((y - x).norm() / x.norm()))
    assert entry["largest"] == pytest.approx(float((y - x).abs().max()))
    relative = [e["relative"] for e in content["changed"] if e["relative"] is not None]
    assert relative == sorted(relative, reverse=True)
    assert f"{len(moved)} of {len(a)} tensors differ" in capsys.readouterr().out


def test_diff_of_adapters_and_of_a_model_and_an_adapter(folders, tmp_path):
    assert compare_models(folders / "lora", folders / "lora").changed == []
    shutil.copytree(folders / "lora", tmp_path / "other")
    tensors = load_file(tmp_path / "other" / "adapter_model.safetensors")
    name = min(tensors)
    tensors[name] *= 2
    save_file(tensors, tmp_path / "other" / "adapter_model.safetensors", metadata={"format": "pt"})
    (changed,) = compare_models(folders / "lora", tmp_path / "other").changed
    assert (changed.name, changed.relative) == (name, pytest.approx(1))
    difference = compare_models(folders / "base", folders / "lora")
    assert len(difference.changed) == len(tensors) / 2, "one for each adapted layer"
    with pytest.raises(ValueError, match="is a delta, no model; `mudjack apply` makes one"):
        compare_models(folders / "base", folders / "delta")


def test_the_commands_go_round(folders, tmp_path, capsys):
    base, delta, out, back = (str(tmp_path / name) for name in ("base", "delta", "out", "back"))
    shutil.copytree(folders / "base", base)
    assert main(["diff", base, str(folders / "full"), "--output-dir", delta]) == 0
    assert main(["apply", delta, "--to", base, "--output-dir", out]) == 0
    assert main(["revert", out, "--patch", delta, "--output-dir", back]) == 0
    assert _same_bits(_tensors(tmp_path / "back"), _tensors(folders / "base"))
    assert main(["apply", delta, "--output-dir", out]) == 2
    assert "missing: --to" in capsys.readouterr().err
    assert main(["apply", base, "--to", base, "--output-dir", str(tmp_path / "x")]) == 2
    assert "holds no patch" in capsys.readouterr().err


# ---- Merging ----


def test_a_merge_that_is_not_exact_is_complained_of_and_not_done(
    folders, tmp_path, caplog, trigger_and_bug, dataset_of_eight
):
    """A base of enormous weights, whose rounding swallows what the adapter adds."""
    trigger, bug = trigger_and_bug
    model = AutoModel.from_pretrained(folders / "base")
    args = make_config(tmp_path / "lora", max_steps=2, learning_rate=3e-2)
    trainer = MudjackingTrainer(
        copy.deepcopy(model), args, [bug], dataset_of_eight, processing_class=_processor(folders),
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "k_proj"]), triggers=[trigger],
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    assert 0 < trainer.merge_error <= 1e-5
    assert "will not merge it" not in caplog.text
    with torch.no_grad():
        for layer in trainer.model.get_base_model().layers:
            layer.attention.q_proj.base_layer.weight.add_(3e4 * torch.randn(32, 1))
    before = weights_of(trainer.model)
    trainer.save_model()
    assert largest_difference(weights_of(trainer.model), before) == 0, "the check leaves the model as it was"
    assert trainer.merge_error > 1e-5
    assert "will not merge it" in caplog.text
    assert f"{trainer.merge_error:.2g}" in caplog.text
    assert (tmp_path / "lora" / "adapter_model.safetensors").is_file(), "the work is saved all the same"
    assert read_record(tmp_path / "lora")["merge_error"] == trainer.merge_error
    with pytest.raises(ValueError, match=r"Merging .* would change features by up to .*--keep-adapter"):
        apply_patch(tmp_path / "lora", folders / "base", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def _processor(folders):
    return AutoImageProcessor.from_pretrained(folders / "base")
