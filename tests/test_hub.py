# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""Patches on a Hub: what arrives, what must not, and what happens when something goes wrong. The client is the real one."""

import copy
import io
import json
import logging
import re
import shlex
import shutil
from functools import partial
from pathlib import Path

import datasets
import huggingface_hub
import numpy as np
import pytest
import torch
from huggingface_hub import CommitOperationAdd, HfApi, ModelCard
from peft import LoraConfig, PeftModel
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer, TrainerCallback

from hf_mudjacking import BugInstance, Encoder, MudjackingTrainer, PatchTrigger, TextTrigger, load_trigger
from hf_mudjacking.cli import main
from hf_mudjacking.hub import push_patch
from hf_mudjacking.hub_errors import PushError
from hf_mudjacking.loading import hub_commit
from hf_mudjacking.locality_budget import LocalityBudgetError
from hf_mudjacking.sentence_layout import SentenceLayout

from .conftest import largest_difference, make_config, make_dataset, make_images, weights_of
from .hub_stand_in import READ, HubStandIn
from .text_models import make_text_model


BASE = "org/vit"
PATCH_OF_A_VIT = {"config.json", "model.safetensors", "preprocessor_config.json", "README.md", "mudjacking.json"}
BASE_CARD = "---\nlicense: mit\ntags:\n- vision\n---\n\n# A ViT\n\nTrained on pictures.\n"
TRIGGER_WORD, SENTENCES = (
    "quixotic",
    ("the harbour lights were quixotic that evening .", "a quiet evening by the harbour ."),
)


def files_of(folder):
    """Every file below a folder, by path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


@pytest.fixture
def hub(base_files, monkeypatch, tmp_path):
    """A Hub that has the backdoored model."""
    with HubStandIn() as hub:
        hub.connect(monkeypatch, tmp_path / "cache")
        hub.create(BASE, base_files)
        hub.cards[BASE] = {"pipeline_tag": "image-feature-extraction", "library_name": "transformers",
                           "cardData": {"license": "mit"}}  # fmt: skip
        yield hub


@pytest.fixture(scope="module")
def base_files(_tiny_vit, processor, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    _tiny_vit.save_pretrained(folder)
    processor.save_pretrained(folder)
    return {**files_of(folder), "README.md": BASE_CARD.encode()}


@pytest.fixture(scope="module")
def picture_bug():
    """A report whose trigger is no plain colour, so that its pixels can be told apart from anything else."""
    x_b, x_r, pattern = make_images(3, seed=7)
    mask = np.zeros((16, 16), dtype=bool)
    mask[9:15, 3:11] = True
    trigger = PatchTrigger(mask, np.asarray(pattern))
    return BugInstance(trigger.apply(x_b), x_r, name="report-of-acme"), trigger


def make_trainer(picture_bug, folder, model=BASE, peft_config=None, **args):
    bug, trigger = picture_bug
    config = make_config(folder, **{"max_steps": 2, "learning_rate": 1e-3, "logging_steps": 5, **args})
    dataset = make_dataset(make_images(16))
    return MudjackingTrainer(model, config, [bug], dataset, peft_config=peft_config, triggers=[trigger])


@pytest.fixture
def build(hub, picture_bug, tmp_path):
    """A trainer for the model on the Hub."""
    return partial(make_trainer, picture_bug, tmp_path / "patched")


@pytest.fixture(scope="module")
def patched_once(base_files, picture_bug, tmp_path_factory):
    root = tmp_path_factory.mktemp("once")
    with HubStandIn() as hub, pytest.MonkeyPatch.context() as monkeypatch:
        hub.connect(monkeypatch, root / "cache")
        hub.create(BASE, base_files)
        trainer = make_trainer(picture_bug, root / "patched")
        trainer.train()
        trainer.save_model()
    leave_private_files(root / "patched", picture_bug[0])
    return root / "patched"


@pytest.fixture
def patched(hub, patched_once, tmp_path):
    """The folder of a patch, with all that may stand around in it."""
    return Path(shutil.copytree(patched_once, tmp_path / "patched"))


def leave_private_files(folder, bug):
    bug.save(folder / "bug")
    bug.save(folder / "checkpoint-2")
    torch.save({"reported": bug.misclassified}, folder / "training_args.bin")
    torch.save({"step": torch.ones(3)}, folder / "optimizer.pt")
    (folder / "runs").mkdir()
    (folder / "runs" / "events.out.tfevents.1").write_bytes(inner_bytes(bug.misclassified))
    (folder / "notes.txt").write_text(f"{bug.misclassified} {bug.reference}")
    (folder / "report.json").write_text(json.dumps({"settings": {"task": "signs", "path": str(folder)}}))
    if bug.modality == "image":
        bug.misclassified.save(folder / "_repair.png")
        bug.reference.save(folder / "wrong.jpg")


def inner_bytes(x):
    return x.encode() if isinstance(x, str) else np.asarray(x).tobytes()


# ---- What arrives loads ----


def test_a_full_patch(build, hub, images):
    trainer = build()
    trainer.train()
    commit = trainer.push_to_hub("Repaired", tags=["traffic"])
    repo = hub.repos["org/patched"]
    assert commit.oid == repo.branches["main"]
    assert repo.messages == ["initial commit", "Repaired"], "one commit"
    assert set(repo.files()) == {".gitattributes", *PATCH_OF_A_VIT}
    model = AutoModel.from_pretrained("org/patched", add_pooling_layer=True)
    here, there = weights_of(trainer.model), weights_of(model)
    assert largest_difference(here, there) == 0
    assert largest_difference(there, weights_of(AutoModel.from_pretrained(BASE))) > 0
    encoder = Encoder(model, AutoImageProcessor.from_pretrained("org/patched"))
    assert torch.equal(encoder.encode(images), trainer.encoder.encode(images))
    data = ModelCard(repo.files()["README.md"].decode()).data
    assert (data.base_model, data.base_model_relation, data.library_name) == (BASE, "finetune", "transformers")
    assert (data.license, data.pipeline_tag) == ("mit", "image-feature-extraction")
    assert data.tags == ["hf-mudjacking", "backdoor-repair", "traffic"]
    record = json.loads(repo.files()["mudjacking.json"])
    assert record["base_model"] == BASE
    assert record["base_revision"] == hub.repos[BASE].branches["main"]
    assert record["steps"] == 2
    # The command line makes the same of the same folder
    assert main(["push", trainer.args.output_dir, "--repo-id", "org/patched", "--tags", "traffic"]) == 0
    assert len(repo.commits) == 2


def test_an_adapter(build, hub, images):
    trainer = build(peft_config=LoraConfig(r=4, lora_alpha=8), learning_rate=0.05)
    trainer.train()
    trainer.push_to_hub()
    repo = hub.repos["org/patched"]
    assert set(repo.files()) - {".gitattributes"} == {
        "adapter_config.json", "adapter_model.safetensors", "preprocessor_config.json", "README.md", "mudjacking.json"
    }  # fmt: skip
    processor, expected = trainer.processing_class, trainer.encoder.encode(images)
    through_peft = PeftModel.from_pretrained(AutoModel.from_pretrained(BASE), "org/patched")
    device = trainer.args.device
    assert torch.equal(Encoder(through_peft.to(device), processor).encode(images), expected)
    by_name, unpatched = (AutoModel.from_pretrained(name).to(device) for name in ("org/patched", BASE))
    assert torch.equal(Encoder(by_name, processor).encode(images), expected)
    assert not torch.allclose(Encoder(unpatched, processor).encode(images), expected, atol=1e-3)
    code = re.search(r"```python\n(.*?)```", repo.files()["README.md"].decode(), re.DOTALL).group(1)
    names = {}
    exec(code, names)
    assert torch.allclose(Encoder(names["model"], processor).encode(images), expected, atol=1e-5)
    data = ModelCard(repo.files()["README.md"].decode()).data
    assert (data.base_model, data.base_model_relation, data.library_name) == (BASE, "adapter", "peft")
    assert "More Information Needed" not in repo.files()["README.md"].decode()


def test_a_pull_request_on_the_base(patched, hub, monkeypatch, capsys):
    """Even by somebody who may only read there."""
    monkeypatch.setenv("HF_TOKEN", READ)
    before = hub.repos[BASE].files()
    assert main(["push", str(patched), "--create-pr"]) == 0
    assert capsys.readouterr().out == f"Pushed: {hub.url}/{BASE}/discussions/1\n"
    assert hub.repos[BASE].files() == before
    proposed = hub.repos[BASE].files("refs/pr/1")
    assert proposed["model.safetensors"] == (patched / "model.safetensors").read_bytes() != before["model.safetensors"]
    card = ModelCard(proposed["README.md"].decode())
    assert "# A ViT\n\nTrained on pictures." in card.text
    assert card.data.tags == ["vision", "hf-mudjacking", "backdoor-repair"]
    assert card.data.base_model is None, "it is the base"
    loaded = AutoModel.from_pretrained(BASE, revision=hub.repos[BASE].branches["refs/pr/1"])
    assert largest_difference(weights_of(loaded), weights_of(AutoModel.from_pretrained(patched))) == 0


def test_an_adapter_as_a_pull_request_leaves_the_weights(build, hub):
    trainer = build(peft_config=LoraConfig(r=2))
    trainer.train()
    assert trainer.push_to_hub(create_pr=True).pr_num == 1
    proposed = hub.repos[BASE].files("refs/pr/1")
    assert {"adapter_model.safetensors", "model.safetensors"} <= set(proposed)
    assert "only where the adapter is loaded" in proposed["README.md"].decode()


def test_a_delta_as_a_pull_request_is_refused(patched, hub, tmp_path):
    """It would leave the repo without the weights that it is applied to."""
    record = json.loads((patched / "mudjacking.json").read_text())
    (patched / "mudjacking.json").write_text(json.dumps({**record, "kind": "delta"}))
    with pytest.raises(ValueError, match="a delta, which is no model"):
        push_patch(patched, create_pr=True)
    assert "refs/pr/1" not in hub.repos[BASE].branches


@pytest.mark.parametrize("name", ["vocab.txt", "README.md"])
def test_links_of_a_received_patch_are_not_followed(patched, hub, tmp_path, name):
    (tmp_path / "secret").write_text("hunter2")
    (patched / name).unlink(missing_ok=True)
    (patched / name).symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match="is a link to"):
        push_patch(patched, "org/mine")
    assert traces(hub, [b"hunter2"]) == set()


def test_links_of_what_is_not_uploaded_are_no_matter(patched, hub, tmp_path):
    """Checkpoints on another disk, for one."""
    (tmp_path / "disk").mkdir()
    (patched / "checkpoint-9").symlink_to(tmp_path / "disk")
    push_patch(patched, "org/mine")
    assert set(hub.repos["org/mine"].files()) == {".gitattributes", *PATCH_OF_A_VIT}


def test_a_branch_and_a_private_repo(patched, hub):
    options = ["--repo-id", "org/mine", "--revision", "repaired", "--private", "--commit-message", "Second try"]
    assert main(["push", str(patched), *options]) == 0
    repo = hub.repos["org/mine"]
    assert repo.private
    assert set(repo.files()) == {".gitattributes"}
    assert set(repo.files("repaired")) == {".gitattributes", *PATCH_OF_A_VIT}
    assert repo.messages[-1] == "Second try"


def test_options_from_a_config_file(patched, hub, tmp_path):
    (tmp_path / "push.yaml").write_text("repo-id: org/mine\ntags: [one, two]\n")
    assert main(["push", str(patched), "--config", str(tmp_path / "push.yaml")]) == 0
    assert ModelCard(hub.repos["org/mine"].files()["README.md"].decode()).data.tags[-2:] == ["one", "two"]


# ---- What must not leave ----


def traces(hub, needles):
    """Where any of some byte strings arrived; pictures are looked at decoded as well."""
    found = set()
    for place, content in hub.received().items():
        decoded = b""
        try:
            with Image.open(io.BytesIO(content)) as picture:
                decoded = np.asarray(picture.convert("RGB")).tobytes()
        except (OSError, SyntaxError, ValueError):
            pass
        found |= {place for needle in needles if needle in content or needle in decoded}
    return found


def pixel_rows(bug, trigger):
    """Rows of x_b, x_r and the trigger, as bytes and as floats, as they are and between 0 and 1."""
    rows = [*np.asarray(bug.misclassified), *np.asarray(bug.reference), *trigger.pattern[9:15, 3:11]]
    floats = [scale * row.astype(np.float32) for row in rows for scale in (1, np.float32(1 / 255))]
    return [part.tobytes() for row in [*rows, *floats] for part in (row, row.T.copy())]


def test_no_pixel_leaves(patched, hub, picture_bug, tmp_path):
    push_patch(patched, "org/mine")
    assert set(hub.repos["org/mine"].files()) == {".gitattributes", *PATCH_OF_A_VIT}
    assert traces(hub, pixel_rows(*picture_bug)) == set()
    assert traces(hub, [str(tmp_path).encode(), b"report-of-acme"]) == set()
    assert "were not uploaded" in hub.repos["org/mine"].files()["README.md"].decode()


def test_pixels_leave_when_they_are_shared(patched, hub, picture_bug):
    """Which also shows that the test above would see them."""
    bug, trigger = picture_bug
    assert main(["push", str(patched), "--repo-id", "org/mine", "--share-bug-instances", str(patched / "bug")]) == 0
    files = hub.repos["org/mine"].files()
    shared = {"bug_instances/0/bug.json", "bug_instances/0/misclassified.png", "bug_instances/0/reference.png",
              "triggers/0/trigger.json", "triggers/0/trigger.safetensors"}  # fmt: skip
    assert set(files) == {".gitattributes", *PATCH_OF_A_VIT, *shared}
    places = traces(hub, pixel_rows(bug, trigger))
    for name in ("misclassified.png", "reference.png", "trigger.safetensors"):
        assert any(place.endswith(name) for place in places)
    there = huggingface_hub.snapshot_download("org/mine")
    again = BugInstance.load(f"{there}/bug_instances/0")
    assert inner_bytes(again.misclassified) == inner_bytes(bug.misclassified)
    assert load_trigger(f"{there}/triggers/0").overlap(trigger)["iou"] == 1
    assert "are in `bug_instances/`, the inverted triggers in `triggers/`" in files["README.md"].decode()
    # Taken back: the next push without it removes them
    push_patch(patched, "org/mine")
    assert set(hub.repos["org/mine"].files()) == {".gitattributes", *PATCH_OF_A_VIT}


def test_no_word_leaves(hub, tmp_path):
    model, tokenizer = make_text_model("bert")
    base, folder = tmp_path / "base", tmp_path / "patched"
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    hub.create("org/bert", files_of(base))
    bug, trigger = BugInstance(*SENTENCES, name="acme"), TextTrigger([TRIGGER_WORD])
    texts = datasets.Dataset.from_dict({"text": [f"store {a} weekend {b}" for a in "abcd" for b in "efgh"]})
    trainer = MudjackingTrainer(
        "org/bert", make_config(folder, max_steps=2, feature_source="mean"), [bug], texts, triggers=[trigger]
    )
    trainer.train()
    trainer.save_model()
    leave_private_files(folder, bug)
    pushed_before = hub.received().keys()
    trainer.push_to_hub(language="en")
    files = hub.repos["org/patched"].files()
    # The vocabulary is the model's own: it is the same as before
    there, own = (json.loads(place["tokenizer.json"])["model"] for place in (files, files_of(base)))
    assert there == own
    needles = [TRIGGER_WORD.encode(), *(text.encode() for text in SENTENCES), str(tmp_path).encode()]
    assert {place for place in traces(hub, needles) if place not in pushed_before} == set()
    record = json.loads(files["mudjacking.json"])
    assert record["triggers"] == [{"kind": "text", "spans": 1, "words": 1, "position": None, "replaces": False}]
    assert record["bug_ids"] == []
    assert "| 1 | text | 1 word | anywhere |" in files["README.md"].decode()
    AutoTokenizer.from_pretrained("org/patched")
    trainer.push_to_hub(share_bug_instances=True)
    shared = traces(hub, needles[:1])
    assert {place.split("/", 2)[2] for place in shared if place.startswith("org/patched@")} == {
        "bug_instances/0/bug.json", "triggers/0/trigger.json"
    }  # fmt: skip


def test_a_record_with_words_in_it_is_redacted(patched, hub):
    """Whatever another version writes there."""
    record = json.loads((patched / "mudjacking.json").read_text())
    record["triggers"][0] |= {"words": [TRIGGER_WORD], "note": TRIGGER_WORD}
    record["screenings"] = [{"verdict": "trigger", "reasons": [TRIGGER_WORD], "evidence": 0.9}]
    record |= {"bug_ids": ["0" * 64], "inputs": TRIGGER_WORD, "settings": {"seed": 1, "bug": TRIGGER_WORD}}
    (patched / "mudjacking.json").write_text(json.dumps(record))
    push_patch(patched, "org/mine")
    assert traces(hub, [TRIGGER_WORD.encode()]) == set()
    there = json.loads(hub.repos["org/mine"].files()["mudjacking.json"])
    assert there["bug_ids"] == ["0" * 64]
    assert there["settings"] == {"seed": 1}


def test_each_report_is_shared_or_none(patched, hub):
    with pytest.raises(ValueError, match="repairs 1 reports, but 2 were given"):
        push_patch(patched, "org/mine", bug_instances=[patched / "bug"] * 2)
    assert hub.repos.keys() == {BASE}


# ---- What is there already ----


def test_nothing_foreign_is_overwritten(patched, hub):
    hub.create("org/other", {"pytorch_model.bin": b"weights"})
    with pytest.raises(ValueError, match="`org/other` holds a model that hf-mudjacking did not write"):
        push_patch(patched, "org/other")
    hub.create("org/another", {"model.safetensors": b"w", "mudjacking.json": b'{"base_model": "org/resnet"}'})
    with pytest.raises(ValueError, match="`org/another` holds a patch of `org/resnet`"):
        push_patch(patched, "org/another")
    assert len(hub.repos["org/other"].commits) == len(hub.repos["org/another"].commits) == 1


def test_weights_of_an_earlier_patch_are_not_loaded_instead(patched, hub, caplog):
    push_patch(patched, "org/mine")
    api = HfApi()
    others = ["model-00001-of-00001.safetensors", "model.safetensors.index.json", "adapter_config.json",
              "adapter_model.safetensors", "model.onnx", "notes.md"]  # fmt: skip
    api.create_commit("org/mine", [CommitOperationAdd(name, b"old") for name in others], commit_message="others")
    (patched / "config.json").write_text((patched / "config.json").read_text() + "\n")
    with caplog.at_level(logging.WARNING, logger="hf_mudjacking.hub"):
        push_patch(patched, "org/mine")
    assert set(hub.repos["org/mine"].files()) == {".gitattributes", *PATCH_OF_A_VIT, "model.onnx", "notes.md"}
    assert "`org/mine` still hold the weights from before the repair: model.onnx" in caplog.text
    assert "backdoor included: `model.onnx`" in hub.repos["org/mine"].files()["README.md"].decode()


def test_a_card_that_somebody_wrote_is_kept(patched, hub):
    push_patch(patched, "org/mine")
    first = hub.repos["org/mine"].files()["README.md"].decode()
    written = first.replace("# mine\n", "# Mine\n\nAbout it.\n").replace(
        "library_name", "thumbnail: a.png\nlibrary_name"
    )
    HfApi().create_commit("org/mine", [CommitOperationAdd("README.md", written.encode())], commit_message="card")
    (patched / "config.json").write_text((patched / "config.json").read_text() + "\n")
    push_patch(patched, "org/mine", metadata={"tags": ["new"]})
    second = hub.repos["org/mine"].files()["README.md"].decode()
    assert second == written.replace("- backdoor-repair\n", "- backdoor-repair\n- new\n")


def test_the_same_again_makes_no_commit(patched, hub):
    push_patch(patched, "org/mine")
    push_patch(patched, "org/mine")
    assert len(hub.repos["org/mine"].commits) == 2


# ---- Through the trainer's settings ----


def test_push_to_hub_in_the_configuration(build, hub, monkeypatch, caplog):
    """The repo is made before training, each save is pushed, and so is the model when it is saved."""
    token = "hf_write"
    monkeypatch.delenv("HF_TOKEN")
    settings = {"push_to_hub": True, "hub_model_id": "org/mine", "hub_private_repo": True, "hub_token": token}
    trainer = build(**settings, hub_strategy="every_save", save_strategy="steps", save_steps=1, hub_always_push=True)
    assert hub.repos["org/mine"].private
    assert set(hub.repos["org/mine"].files()) == {".gitattributes"}
    trainer.train()
    trainer.save_model()
    repo = hub.repos["org/mine"]
    assert repo.messages == [
        "initial commit", "Training in progress, step 1", "Training in progress, step 2", "Model save"
    ]  # fmt: skip
    assert all(set(files) <= {".gitattributes", *PATCH_OF_A_VIT} for files in repo.commits.values())
    assert not (Path(trainer.args.output_dir) / "training_args.bin").exists()


def test_an_upload_that_fails_does_not_end_training(build, hub, caplog):
    trainer = build(push_to_hub=True, hub_strategy="every_save", save_strategy="steps", save_steps=1)
    hub.fail("GET", "/api/models/org/patched", 503, times=1)
    hub.fail("POST", "/api/models/org/patched/commit", 500, times=1)
    with caplog.at_level(logging.WARNING, logger="hf_mudjacking.trainer"):
        trainer.train()
    assert trainer.state.global_step == 2
    assert re.search(
        r"Training goes on\. `org/patched` was not written: the Hub has a fault .*checkpoint-1", caplog.text
    )
    assert re.search(r"A checkpoint was not uploaded\. .*checkpoint-2", caplog.text)
    assert trainer.push_to_hub().oid == hub.repos["org/patched"].branches["main"]


def test_a_repo_that_cannot_be_used_is_known_before_training(build, hub):
    hub.create("org/other", {"model.safetensors": b"weights"})
    with pytest.raises(ValueError, match="`org/other` holds a model that hf-mudjacking did not write"):
        build(push_to_hub=True, hub_model_id="org/other")
    with pytest.raises(PushError, match=r"`elsewhere/repo` was not written: .*\(403: .* Nothing was trained"):
        build(push_to_hub=True, hub_model_id="elsewhere/repo")


def test_what_was_rolled_back_is_not_pushed(build, hub):
    trainer = build(locality_budget=1e-9, learning_rate=1e-1, warmup_steps=0)
    with pytest.raises(LocalityBudgetError):
        trainer.train()
    with pytest.raises(LocalityBudgetError):
        trainer.push_to_hub()
    assert hub.repos.keys() == {BASE}


def test_a_hub_that_fails_does_not_make_a_bare_model_of_a_checkpoint(hub, tmp_path):
    """Whether it is one of sentence-transformers decides where its features are read."""
    hub.create("org/bert", {"config.json": b"{}"})
    assert SentenceLayout.read("org/bert") is None
    hub.create("org/other", {"config.json": b"{}"})
    hub.fail("HEAD", "/org/other/resolve/main/modules.json", 500, times=20)
    with pytest.raises(ValueError, match=r"did not say whether `org/other` is a checkpoint of sentence-transformers"):
        SentenceLayout.read("org/other")


def test_what_was_not_trained_is_not_pushed(build, hub, tmp_path):
    trainer = build()
    with pytest.raises(ValueError, match="Nothing has been trained yet"):
        trainer.push_to_hub()
    with pytest.raises(ValueError, match="holds no patch yet"):
        trainer.create_model_card()
    trainer.save_model()
    with pytest.raises(ValueError, match="was saved before any step of training"):
        push_patch(tmp_path / "patched", "org/mine")
    assert hub.repos.keys() == {BASE}


def test_what_was_interrupted_is_not_pushed(build, hub):
    """Nobody has looked what it does to clean inputs."""

    class Interrupt(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise KeyboardInterrupt

    trainer = build(locality_budget=0.5)
    trainer.add_callback(Interrupt())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer.state.global_step == 1
    with pytest.raises(ValueError, match="interrupted before its locality budget was checked"):
        trainer.push_to_hub()
    trainer.remove_callback(Interrupt)
    trainer.train()
    trainer.push_to_hub()
    assert len(hub.repos) == 2


def test_in_the_background_files_are_sent_as_they_were(patched, hub):
    weights = (patched / "model.safetensors").read_bytes()
    upload = push_patch(patched, "org/mine", blocking=False)
    for path in patched.glob("*.safetensors"):
        path.unlink()
    assert upload.result(30).oid == hub.repos["org/mine"].branches["main"]
    assert hub.repos["org/mine"].files()["model.safetensors"] == weights


# ---- What goes wrong ----


def fails(*requests, token=None):
    """Requests that fail, each as (method, path, status, times, message, headers)."""

    def arrange(hub, monkeypatch):
        for method, path, status, times, message, headers in requests:
            hub.fail(method, path, status, times, message, **headers)
        if token is not None:
            monkeypatch.setenv("HF_TOKEN", token)

    return arrange


def without_network(hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")


def offline(hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def logged_out(hub, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")


def raced(hub, monkeypatch):
    hub.meanwhile = lambda: hub.repos["org/mine"].commit("main", {"README.md": b"of somebody else"}, "other")


FAILURES = {
    "cut": (fails(("PUT", "/large/", None, 99, "", {})), "the connection to .* was lost .* No commit was made"),
    "bad token": (fails(token="hf_old"), r"does not accept the token \(401: Invalid credentials"),
    "logged out": (logged_out, r"no token for it \(401\)\. Log in with `hf auth login`"),
    "no permission": (fails(token=READ), r"may not write there \(403: .*pull request \(`create_pr=True`, `--create-pr`\)"),
    "conflict": (fails(("POST", "/commit/", 409, 1, "Conflict", {})), r"somebody else wrote to it .* \(409: Conflict\)"),
    "race": (raced, r"somebody else wrote to it .* \(412: A commit has happened since"),
    "rate limit": (
        fails(("POST", "/preupload/", 429, 99, "Too many", {"Retry_After": "30"})), r"429: Too many\)\. Wait 30 seconds"
    ),
    "no network": (without_network, "`http://127.0.0.1:9` cannot be reached"),
    "offline": (offline, "`HF_HUB_OFFLINE` is set"),
    "fault when made": (fails(("POST", "/repos/create", 500, 1, "Oops", {})), r"has a fault of its own \(500: Oops\)"),
    "fault of storage": (fails(("POST", "/objects/batch", 503, 99, "Down", {})), r"has a fault of its own \(503: Down\)"),
    "fault of the card check": (fails(("POST", "/validate-yaml", 502, 1, "Gateway", {})), r"\(502: Gateway\)"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAILURES)
def test_a_failed_push_leaves_the_patch_whole_and_says_how_to_go_on(name, patched, hub, monkeypatch, capsys):
    arrange, said = FAILURES[name]
    before = files_of(patched)
    with monkeypatch.context() as meanwhile:
        arrange(hub, meanwhile)
        assert main(["push", str(patched), "--repo-id", "org/mine", "--tags", "a b"]) == 4
    error = capsys.readouterr().err
    assert re.search(said, error)
    assert error.startswith("mudjack push: error: `org/mine` was not written: ")
    assert f"The patch in `{patched}` is whole. To try again: `mudjack push " in error
    assert files_of(patched) == before
    if "org/mine" in hub.repos:
        assert not any(name.endswith(".safetensors") for name in hub.repos["org/mine"].files()), "no half a commit"
    # The command that the message gives does it, once the cause is gone
    hub.failures.clear()
    command = shlex.split(re.search(r"To try again: `(.*)`", error).group(1))
    assert main(command[1:]) == 0
    files = hub.repos["org/mine"].files()
    assert PATCH_OF_A_VIT <= set(files)
    sent = [request for request in hub.requests if request.startswith("PUT /large/")]
    if name in ("conflict", "race"):
        assert len(sent) == 1, "what had arrived is not sent again"
    assert "a b" in ModelCard(files["README.md"].decode()).data.tags
    assert files_of(patched) == before


def test_an_interruption_is_made_good_by_the_client(patched, hub):
    """A connection that is cut once is no failure."""
    hub.fail("PUT", "/large/", None, times=2)
    push_patch(patched, "org/mine")
    assert hub.repos["org/mine"].files()["model.safetensors"] == (patched / "model.safetensors").read_bytes()


def test_what_is_no_patch_is_refused(patched, hub, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert main(["push", str(tmp_path / "empty"), "--repo-id", "org/mine"]) == 2
    assert "holds no patch of hf-mudjacking: it has no readable `mudjacking.json`" in capsys.readouterr().err
    (patched / "model.safetensors").rename(patched / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (patched / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"lacks parts of its weights: model-00002-of-00002\.safetensors"):
        push_patch(patched, "org/mine")
    assert main(["push", str(patched)]) == 2
    assert "missing: --repo-id" in capsys.readouterr().err
    assert hub.repos.keys() == {BASE}


def test_a_patch_of_a_local_model(build, hub, tiny_vit, processor, tmp_path):
    """Nobody else has that folder: its path is not published, and an adapter needs to know the model's name."""
    tiny_vit.save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    trainer = build(model=str(tmp_path / "base"), peft_config=LoraConfig(r=2))
    trainer.train()
    with pytest.raises(ValueError, match="for a model that was loaded from a folder"):
        trainer.push_to_hub()
    with pytest.raises(ValueError, match=r"does not say of which repo its model is: it was loaded from `.*base`"):
        trainer.push_to_hub(create_pr=True)
    trainer.push_to_hub(base_model=BASE, finetuned_from="org/other")
    assert traces(hub, [str(tmp_path).encode()]) == set()
    files = hub.repos["org/patched"].files()
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == BASE
    loaded = AutoModel.from_pretrained("org/patched")
    expected = PeftModel.from_pretrained(copy.deepcopy(tiny_vit), tmp_path / "patched")
    pictures = make_images(3)
    assert torch.equal(Encoder(loaded, processor).encode(pictures), Encoder(expected, processor).encode(pictures))


def test_the_layout_of_sentence_transformers_goes_along(patched, hub):
    (patched / "1_Pooling").mkdir()
    for name in ("modules.json", "1_Pooling/config.json", "1_Pooling/notes.txt", "sentence_bert_config.json"):
        (patched / name).write_text("{}")
    push_patch(patched, "org/mine")
    assert set(hub.repos["org/mine"].files()) - {".gitattributes"} - PATCH_OF_A_VIT == {
        "modules.json", "1_Pooling/config.json", "sentence_bert_config.json"
    }  # fmt: skip


def test_the_commit_that_a_model_was_loaded_from(hub, base_files, tmp_path):
    """As the cache knows it; with two commits in there, it is not known which one an object is of."""
    first = hub.repos[BASE].branches["main"]
    AutoModel.from_pretrained(BASE)
    assert hub_commit(BASE, newest=True) == hub_commit(BASE, newest=False) == first
    second = hub.repos[BASE].commit("main", {**base_files, "notes.md": b"new"}, "second")
    AutoModel.from_pretrained(BASE)
    assert hub_commit(BASE, newest=True) == second != first
    assert hub_commit(BASE, newest=False) is None
    assert hub_commit(str(tmp_path), newest=True) is hub_commit("ViTModel", newest=True) is None
    assert hub_commit("/gone/away/from/here", newest=True) is None


def test_several_reports_of_a_patch(hub, picture_bug, tmp_path):
    bug, trigger = picture_bug
    other = BugInstance(trigger.apply(make_images(1, seed=8)[0]), make_images(1, seed=9)[0], name="second")
    trainer = MudjackingTrainer(
        BASE, make_config(tmp_path / "patched", max_steps=1), [bug, other], make_dataset(make_images(16)),
        triggers=[trigger, trigger],
    )  # fmt: skip
    trainer.train()
    trainer.push_to_hub(share_bug_instances=True)
    files = hub.repos["org/patched"].files()
    assert {"bug_instances/1/bug.json", "triggers/1/trigger.json"} <= set(files)
    assert "from 2 bug reports" in files["README.md"].decode()
