# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""The card of a patch says what its record says, and leaves alone what somebody else wrote."""

import json

import numpy as np
import pytest
from huggingface_hub import ModelCard
from peft import LoraConfig

from hf_mudjacking import AdditiveTrigger, BlendTrigger, MudjackingTrainer, PatchTrigger, TextTrigger, WarpTrigger
from hf_mudjacking.model_card import patch_card
from hf_mudjacking.triggers import square_patch

from .conftest import make_config


def rates(ba, asr, ra, fixed):
    return {"BA": ba, "ASR": asr, "RA": ra, "bug_fixed": fixed}


BLOCK = {
    "clean": {"CA": 0.99, "ASR-B": 0.01, "RA": 0.931},
    "before": {"kept": rates(0.98, 1.0, 0.0, False), "retrained": rates(0.98, 1.0, 0.0, False)},
    "after": {"kept": rates(0.975, 0.004, 0.96, True), "retrained": rates(0.985, 0.002, 0.97, True)},
}
OTHER = {"before": {"kept": rates(0.7, 0.9, 0.1, None)}, "after": {"kept": rates(0.71, 0.1, 0.6, None)}}
PATCH = PatchTrigger(np.eye(16, dtype=bool), np.full((16, 16, 3), 9))
RECORD = {
    "hf_mudjacking": "0.1.0",
    "kind": "full",
    "base_model": "org/vit",
    "base_revision": "a" * 40,
    "base_weights_sha256": "b" * 64,
    "bug_ids": ["c" * 64],
    "triggers": [PATCH.summary()],
    "evidence": [0.87],
    "screenings": [{"verdict": "trigger", "believed": 0.87, "transfer": 0.973, "evidence": 0.87}],
    "skipped": [],
    "remembered": [],
    "locality": {"mean": 0.0123, "nearest": [0.05, 0.0456]},
    "settings": {"seed": 3, "learning_rate": 0.0003},
    "versions": {"torch": "2.13.0", "hf_mudjacking": "0.1.0"},
    "steps": 300,
    "figures": {},
}


@pytest.fixture
def card(tmp_path):
    """The card of a record, changed here and there."""

    def make(repo_id="org/fixed", base_model="org/vit", report=None, without=(), **changes):
        arguments = {key: changes.pop(key) for key in ("earlier", "metadata", "base_metadata", "unrepaired", "shared")
                     if key in changes}  # fmt: skip
        record = {key: value for key, value in {**RECORD, **changes}.items() if key not in without}
        (tmp_path / "mudjacking.json").write_text(json.dumps(record))
        if report is not None:
            (tmp_path / "report.json").write_text(json.dumps(report))
        return patch_card(tmp_path, repo_id, base_model=base_model, **arguments)

    return make


# ---- What it says ----


def test_rates_before_and_after(card):
    text = card(
        figures={"signs": {**BLOCK, "classifier": "logistic", "other_classifiers": {"mlp": OTHER}}, "faces": OTHER}
    )
    table = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| signs")
    ]
    assert table == [
        ["signs", "logistic", "never attacked", "99.0", "1.0", "93.1", ""],
        ["signs", "logistic", "before the repair", "98.0", "100.0", "0.0", "no"],
        ["signs", "logistic", "repaired, classifier kept", "97.5", "0.4", "96.0", "yes"],
        ["signs", "logistic", "repaired, classifier retrained", "98.5", "0.2", "97.0", "yes"],
        ["signs", "mlp", "before the repair", "70.0", "90.0", "10.0", ""],
        ["signs", "mlp", "repaired, classifier kept", "71.0", "10.0", "60.0", ""],
    ]
    assert "| faces | main | repaired, classifier kept | 71.0 | 10.0 | 60.0 |  |" in text
    # The same in numbers, for the Hub
    results = ModelCard(text).data.eval_results
    found = {(r.dataset_name, r.metric_name): (r.metric_type, r.metric_value) for r in results}
    assert len(results) == len(found) == 12 + 6 + 6
    assert found["signs", "CA (never attacked, logistic)"] == ("accuracy", 0.99)
    assert found["signs", "ASR (repaired, classifier kept, logistic)"] == ("attack_success_rate", 0.004)
    assert found["signs", "RA (repaired, classifier retrained, logistic)"] == ("robust_accuracy", 0.97)
    assert found["faces", "BA (before the repair, main)"] == ("accuracy", 0.7)
    assert {r.task_type for r in results} == {"image-classification"}


def test_the_card_of_a_text_model_without_a_verified_trigger(card):
    """Of the triggers alone it was one for images."""
    settings = {"triggers": [None], "screenings": [], "evidence": [], "figures": {"reviews": OTHER}}
    kinds = {}
    for modality in ("text", "image"):
        results = ModelCard(card(modality=modality, **settings)).data.eval_results
        kinds[modality] = {r.task_type for r in results}
    assert kinds == {"text": {"text-classification"}, "image": {"image-classification"}}


def test_rates_come_from_the_report_where_the_record_has_none(card):
    report = {**BLOCK, "settings": {"task": "signs", "classifier": "logistic", "trigger_measured": "inverted"},
              "other_tasks": {"faces": OTHER}, "triggers": [], "cost": {"seconds": 3.0}}  # fmt: skip
    # As in records of earlier versions
    text = card(report=report, without=("figures",))
    assert "| signs | logistic | repaired, classifier kept | 97.5 | 0.4 | 96.0 | yes |" in text
    assert "| faces | main | repaired, classifier kept | 71.0 | 10.0 | 60.0 |  |" in text
    assert "measured with the trigger that was found, not with the attacker's own" in text
    in_record = card(
        figures={"signs": {**BLOCK, "classifier": "logistic", "trigger_measured": "inverted"}, "faces": OTHER}
    )
    assert in_record == text
    # This version's record says that nothing was measured: what lies there is of another patch
    assert "No downstream check was recorded" in card(report=report)


def test_without_rates(card):
    text = card()
    assert "No downstream check was recorded" in text
    assert "Not checked: downstream accuracy, attack success rate, robust accuracy." in text
    assert ModelCard(text).data.eval_results is None


@pytest.mark.parametrize(
    ("trigger", "expected"),
    [
        (square_patch((16, 16), 4), "patch | 6.2% of the picture | rows 13 to 16, columns 13 to 16 of 16 × 16"),
        (PatchTrigger(np.eye(16), np.full((16, 16, 3), 255), "anywhere"), "patch | 6.2% of the picture | anywhere"),
        (BlendTrigger(np.full((8, 8, 3), 200), 0.25), "blend | opacity 0.25 | 100% of the picture"),
        (AdditiveTrigger(np.full((8, 8, 3), 4.0)), "additive | 4.0 of 255 levels on average | the whole picture"),
        (WarpTrigger(np.full((2, 4, 4), 0.03)), "warp | 4.2% of the side on average | the whole picture"),
        (TextTrigger(["cf"]), "text | 1 word | anywhere"),
        (TextTrigger(["a b", "c"], position=-1), "text | 3 words in 2 places | at the end"),
        (TextTrigger(["≡"], position=0, replaces=True), "text | 1 word | at the front"),
        (TextTrigger(["cf"], position=4), "text | 1 word | at word 4"),
    ],
)
def test_what_was_found(card, trigger, expected):
    text = card(triggers=[trigger.summary()])
    assert f"| 1 | {expected} | 0.97 | 0.87 | trigger |" in text
    # An id of a text could be confirmed by guessing the text
    assert ("c" * 64 in text) == (trigger.kind != "text")


def test_reports_that_were_given_left_out_and_not_verified(card):
    text = card(
        triggers=[None, PATCH.summary()],
        evidence=[0.2, 0.9],
        screenings=[
            {"verdict": "malicious", "transfer": 0.5}, {"verdict": "natural", "transfer": 0.3},
            {"verdict": "trigger", "transfer": 0.9},
        ],
        skipped=[0],
        remembered=[{**PATCH.summary(), "cosine_before": 0.991, "cosine_after": None}],
    )  # fmt: skip
    assert "| 1 | none was verified, repaired without | – | – | 0.30 | 0.20 | natural |" in text
    assert (
        "| 2 | patch | 6.2% of the picture | rows 1 to 16, columns 1 to 16 of 16 × 16 | 0.90 | 0.90 | trigger |"
        in text
    )
    assert "Left out, because it could not be believed: 1 report." in text
    assert "no trigger was verified; it was repaired without one" in text
    assert "patch (cosine of stamped with clean features 0.991 before this one, – after it)" in text
    known = card(screenings=[], evidence=[])
    assert "| 1 | patch | 6.2% of the picture | rows 1 to 16, columns 1 to 16 of 16 × 16 | – | – | given |" in known


def test_limits_settings_and_versions(card):
    text = card(patched_tokens=2, moved_levels=2.0)
    assert "cosine distance of 0.0123 on average, 0.0500 for those most like a reported input" in text
    assert "Only the embeddings of 2 tokens changed" in text
    for row in ("| seed | 3 |", "| learning rate | 0.0003 |", "| torch | 2.13.0 |", "| steps | 300 |",
                "| levels of 255 that stamped pictures were moved by | 2.0 |",
                f"| base revision | {'a' * 40} |", f"| SHA-256 of the base weights | {'b' * 64} |"):  # fmt: skip
        assert row in text
    assert "@inproceedings{liu2024mudjacking," in text
    assert "How far features of clean inputs moved was not recorded." in card(locality=None)


def test_a_record_of_an_earlier_version(card):
    """It lacks what was added since."""
    added = ("kind", "base_weights_sha256", "bug_ids", "versions", "figures", "evidence", "screenings", "locality")
    text = card(without=added)
    assert "| hf-mudjacking | 0.1.0 |" in text
    assert "| 1 | patch | 6.2% of the picture | rows 1 to 16, columns 1 to 16 of 16 × 16 | – | – | given |" in text
    assert "not recorded" in text


def test_how_to_load_it(card, tmp_path):
    full = card()
    assert 'model = AutoModel.from_pretrained("org/fixed")' in full
    assert "mudjack apply org/fixed --to org/vit --output-dir repaired" in full
    (tmp_path / "config.json").write_text('{"architectures": ["CLIPVisionModelWithProjection"]}')
    assert 'CLIPVisionModelWithProjection.from_pretrained("org/fixed")' in card()
    (tmp_path / "config.json").write_text('{"architectures": ["BlipVisionModel"]}')
    assert 'BlipVisionModel.from_pretrained("org/fixed")' in card()
    # A name of transformers that is no model
    (tmp_path / "config.json").write_text('{"architectures": ["pipeline"]}')
    assert 'AutoModel.from_pretrained("org/fixed")' in card()
    adapter = card(kind="lora")
    assert f'from_pretrained("org/vit", revision="{"a" * 40}")' in adapter
    assert 'PeftModel.from_pretrained(model, "org/fixed")' in adapter
    assert "mudjack apply" not in card(base_model=None)


def test_what_is_repaired_and_what_it_is_of(card):
    data = ModelCard(
        card(base_metadata={"license": "mit", "library_name": "timm", "pipeline_tag": "mask-generation"})
    ).data
    assert (data.base_model, data.base_model_relation, data.library_name) == ("org/vit", "finetune", "timm")
    assert (data.license, data.pipeline_tag) == ("mit", "mask-generation")
    adapter = ModelCard(card(kind="lora")).data
    assert (adapter.base_model_relation, adapter.library_name) == ("adapter", "peft")
    local = card(base_model=None)
    assert ModelCard(local).data.base_model is None
    assert "a model that is not on the Hub" in local
    own = card(repo_id="org/vit")
    assert "The weights of this repo were repaired of a backdoor." in own
    assert ModelCard(own).data.base_model is None


def test_markup_in_names_stays_text(card):
    text = card(figures={"a|b <!-- hf-mudjacking: end -->\n# x": OTHER}, settings={"seed": 1, "a|b": 2})
    assert "| a\\|b &lt;!-- hf-mudjacking: end --> # x | main | before the repair |" in text
    assert "| a\\|b | 2 |" in text
    assert card(earlier=text, figures={}).count("## Backdoor repair") == 1


# ---- What is there already ----


EARLIER = """---
license: cc-by-4.0
language: [en, de]
tags:
- vision
widget:
- src: https://example.org/a.png
model-index:
- name: theirs
  results:
  - task: {type: image-classification}
    dataset: {name: ImageNet, type: imagenet-1k}
    metrics: [{type: accuracy, value: 0.8}]
---

# Their model

Made by them.
"""


def test_a_card_is_added_to(card):
    text = card(earlier=EARLIER, figures={"signs": BLOCK}, base_metadata={"license": "mit", "pipeline_tag": "x"})
    assert text.split("---\n", 2)[2].startswith("\n# Their model\n\nMade by them.\n\n<!-- hf-mudjacking: begin -->")
    merged = ModelCard(text)
    assert merged.data.license == "cc-by-4.0", "what they say is right"
    assert merged.data.pipeline_tag == "x", "what they do not say is added"
    assert merged.data.widget == [{"src": "https://example.org/a.png"}]
    assert merged.data.tags == ["vision", "hf-mudjacking", "backdoor-repair"]
    assert merged.data.base_model == "org/vit"
    assert {result.dataset_name for result in merged.data.eval_results} == {"ImageNet", "signs"}


def test_what_was_ours_is_replaced(card):
    first = card(earlier=EARLIER, figures={"signs": BLOCK})
    written_below = first + "\n## Thanks\n\nTo you.\n"
    second = card(earlier=written_below, figures={"faces": OTHER}, metadata={"license": "mit", "tags": ["new"]})
    assert second.endswith("<!-- hf-mudjacking: end -->\n\n## Thanks\n\nTo you.\n")
    assert second.count("## Backdoor repair") == 1
    data = ModelCard(second).data
    assert {result.dataset_name for result in data.eval_results} == {"ImageNet", "faces"}
    assert data.license == "mit", "what is asked for now comes first"
    assert data.tags == ["vision", "hf-mudjacking", "backdoor-repair", "new"]
    assert card(earlier=second, figures={"faces": OTHER}) == second


def test_metadata_that_cannot_be_read_is_not_thrown_away(card):
    with pytest.raises(ValueError, match=r"metadata at the head of the card .* cannot be read"):
        card(earlier="---\nlicense: [mit\n---\n\n# Theirs\n")


# ---- From the trainer ----


def test_the_trainer_writes_it_beside_what_is_there(tiny_vit, processor, bug, trigger, dataset, tmp_path):
    """And a save does not put PEFT's empty card in its place."""
    trainer = MudjackingTrainer(
        tiny_vit, make_config(tmp_path, max_steps=1), [bug], dataset, processing_class=processor,
        peft_config=LoraConfig(r=2), triggers=[trigger],
    )  # fmt: skip
    trainer.train()
    (tmp_path / "README.md").write_text("---\nlanguage: en\n---\n\n# Mine\n")
    trainer.save_model()
    trainer.create_model_card(tags="cars", license="mit", model_name="org/cars", dataset="clients of acme")
    text = (tmp_path / "README.md").read_text()
    assert "\n# Mine\n" in text
    assert "More Information Needed" not in text
    assert "acme" not in text
    assert "| 1 | patch | 6.2% of the picture |" in text
    data = ModelCard(text).data
    assert (data.language, data.license, data.tags[-1], data.library_name) == ("en", "mit", "cars", "peft")
