# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""The command line on a real backdoored model, as a user has it: folders and files."""

import json
import shutil

import datasets
import numpy as np
import pytest
from PIL import Image
from transformers import AutoModel

from hf_mudjacking import BugInstance, Encoder, MudjackingTrainer, load_trigger
from hf_mudjacking.cli import main
from hf_mudjacking.cli.main import COMMANDS
from hf_mudjacking.evaluation import draw_bug_report

from .conftest import Backdoored, make_dataset


pytestmark = pytest.mark.usefixtures("short_searches")


@pytest.fixture(scope="module")
def files(backdoored: Backdoored, tmp_path_factory) -> dict[str, str]:
    """Model folder, report, clean inputs and labelled sets on disk."""
    root = tmp_path_factory.mktemp("cli")
    backdoored.model().save_pretrained(root / "model")
    backdoored.processor.save_pretrained(root / "model")
    bug = backdoored.bug(seed=5)
    bug.misclassified.save(root / "wrong.png")
    bug.reference.save(root / "right.png")
    bug.save(root / "bug")
    backdoored.dataset(400).to_parquet(root / "clean.parquet")
    for part, data in (("train", backdoored.train.select(range(600))), ("test", backdoored.test.select(range(300)))):
        labelled = make_dataset(data.inputs, label=data.labels.tolist()).rename_column("image", "digit")
        labelled.to_parquet(root / f"{part}.parquet")
    folder = root / "pictures"
    folder.mkdir()
    for i, image in enumerate(backdoored.train.inputs[:40]):
        image.save(folder / f"{i}.png")
    return {
        name: str(root / path)
        for name, path in {
            "model": "model",
            "wrong": "wrong.png",
            "right": "right.png",
            "bug": "bug",
            "clean": "clean.parquet",
            "train": "train.parquet",
            "test": "test.parquet",
            "pictures": "pictures",
        }.items()
    }


def report_options(files: dict[str, str], dataset: str = "clean") -> list[str]:
    return ["--model", files["model"], "--bug", files["bug"], "--dataset", files[dataset], "--disable-tqdm"]


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert "usage: mudjack" in capsys.readouterr().out


def test_env_names_versions(capsys):
    assert main(["env"]) == 0
    assert "- transformers: " in capsys.readouterr().out


def test_invert_finds_the_trigger_and_changes_nothing(files, backdoored, tmp_path, capsys):
    options = ["--model", files["model"], "--misclassified", files["wrong"], "--reference", files["right"]]
    code = main(
        ["invert", *options, "--dataset", files["pictures"], "--output-dir", str(tmp_path / "out"), "--disable-tqdm"]
    )
    assert code == 0
    told = capsys.readouterr()
    assert told.out.startswith("Verified: evidence 0.9")
    assert "%|" not in told.err, "no bars, also of the libraries that load model and data"
    assert load_trigger(tmp_path / "out").overlap(backdoored.trigger)["recall"] >= 0.9
    # Its own results may be written over
    again = ["invert", *options, "--dataset", files["pictures"], "--output-dir", str(tmp_path / "out")]
    assert main([*again, "--disable-tqdm"]) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "inversion.png",
        "trigger.json",
        "trigger.safetensors",
    ]


def test_a_second_report_is_not_lost_without_a_word(files, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["invert", "--bug", files["bug"], "--bug", files["bug"], "--output-dir", str(tmp_path)])
    assert "--bug was given twice; one report at a time" in capsys.readouterr().err


def test_a_repair_that_did_nothing_is_told(files, tmp_path, capsys):
    command = ["patch", *report_options(files), "--batch-size", "8", "--locality-budget", "none"]
    assert main([*command, "--output-dir", str(tmp_path / "short"), "--max-steps", "1"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "After 1 of 1 steps:" in told
    assert "of the way to where x_b was" in told
    assert "The bug is NOT repaired" in told


def test_what_nobody_foresaw_is_no_answer(monkeypatch, capsys):
    monkeypatch.setattr("hf_mudjacking.cli.env.run", lambda options: {}["unforeseen"])
    assert main(["env"]) == 70
    assert "KeyError: 'unforeseen'" in capsys.readouterr().err


def test_invert_says_when_nothing_is_verified(files, backdoored, tmp_path, capsys):
    labels = backdoored.test.labels
    a, b = (backdoored.test.inputs[int(np.flatnonzero(labels == label)[0])] for label in (3, 8))
    BugInstance(a, b).save(tmp_path / "natural")
    options = ["--model", files["model"], "--bug", str(tmp_path / "natural"), "--dataset", files["clean"]]
    code = main(["invert", *options, "--output-dir", str(tmp_path / "out"), "--min-evidence", "0.5", "--disable-tqdm"])
    assert code == 1
    assert capsys.readouterr().out.startswith("NOT verified")
    code = main(["patch", *options, "--output-dir", str(tmp_path / "p"), "--min-evidence", "0.5", "--disable-tqdm"])
    assert code == 1
    assert "Nothing was patched" in capsys.readouterr().out
    assert not (tmp_path / "p").exists()
    assert not list((tmp_path / "p").rglob("*.safetensors"))


def test_patch_resumes(files, tmp_path, monkeypatch, capsys):
    """As if it had never been interrupted, and without inverting the report anew."""
    command = ["patch", *report_options(files), "--max-steps", "6", "--batch-size", "8", "--save-steps", "3",
               "--locality-budget", "none"]  # fmt: skip
    assert main([*command, "--output-dir", str(tmp_path / "whole")]) == 0
    expected = (tmp_path / "whole" / "model.safetensors").read_bytes()
    # Who prepares the pictures makes no difference
    assert main([*command, "--workers", "2", "--output-dir", str(tmp_path / "workers")]) == 0
    assert (tmp_path / "workers" / "model.safetensors").read_bytes() == expected
    out = tmp_path / "cut"
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", out / "checkpoint-3")
    monkeypatch.setattr(MudjackingTrainer, "invert_triggers", lambda self: pytest.fail("inverted again"))
    assert main([*command, "--output-dir", str(out), "--resume"]) == 0
    assert (out / "model.safetensors").read_bytes() == expected
    labelled = [
        "--labelled-train",
        files["train"],
        "--labelled-test",
        files["test"],
        "--labelled-input-column",
        "digit",
    ]
    assert main([*command, *labelled, "--output-dir", str(out), "--resume"]) == 0
    report = json.loads((out / "report.json").read_text())
    assert report["settings"]["trigger_measured"] == "inverted"
    # What the inversion found is in the checkpoint, what it took is not
    screening = json.loads((out / "mudjacking.json").read_text())["screenings"][0]
    found = {name: screening[name] for name in ("transfer", "evidence")}
    assert {name: report["triggers"][0][name] for name in found} == found
    assert report["cost"]["resumed_at_step"] == 6
    told = " ".join(capsys.readouterr().out.split())
    assert "given by the user" not in told
    assert "Cost (since it was resumed at step 6): 0 forwards to invert" in told
    # The picture of another report goes, that of this one stays
    assert not (out / "_repair.png").exists()
    for ids, stays in ((None, True), (["0" * 64], False)):
        (out / "_repair.png").write_bytes(b"")
        if ids:
            record = json.loads((out / "mudjacking.json").read_text())
            (out / "mudjacking.json").write_text(json.dumps({**record, "bug_ids": ids}))
        assert main([*command, "--output-dir", str(out), "--resume"]) == 0
        assert (out / "_repair.png").exists() == stays
    capsys.readouterr()
    for other in (["--learning-rate", "1e-3"], ["--max-steps", "4"], ["--batch-size", "4"]):
        assert main([*command, *other, "--output-dir", str(out), "--resume"]) == 2
        assert "is of a run with other settings" in capsys.readouterr().err
    assert main([*command, "--output-dir", str(tmp_path / "nothing"), "--resume"]) == 2
    assert "There is no complete checkpoint" in capsys.readouterr().err


def test_a_negative_seed(capsys):
    with pytest.raises(SystemExit):
        main(["patch", "--seed", "-1"])
    assert "--seed -1: a seed is 0 or more" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("max-steps: 5.9", "`max-steps: 5.9` is not a valid value"),
        ("max-steps: true", "`max-steps: True` is not a valid value"),
        ("max-steps:", "`max-steps` has no value"),
        ("model: [a, b]", "is not a valid value"),
        ("locality-budget: abc", "`locality-budget: 'abc'` is not a valid value"),
        # What YAML makes of a text is not what was written
        ("misclassified-text: no", "`misclassified-text: False` is no text as it stands; put it in quotes"),
        ("split: 1.10", "`split: 1.1` is no text as it stands; put it in quotes"),
        ("lora-rank:", "`lora-rank` has no value; give one (`lora-rank: 4`), or leave the line out"),
        ("lora-rank: null", "`lora-rank` has no value"),
        ("bug: [a, no]", "`bug: ['a', False]` is no text as it stands; put it in quotes"),
    ],
)
def test_values_of_a_config_file_are_not_bent(line, message, tmp_path, capsys):
    config = tmp_path / "patch.yaml"
    config.write_text(line + "\n")
    with pytest.raises(SystemExit) as stop:
        main(["patch", "--config", str(config)])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_patch_from_a_config_file_repairs_and_reports(files, backdoored, tmp_path, capsys):
    config = tmp_path / "patch.yaml"
    config.write_text(
        f"model: {files['model']}\nbug: {files['bug']}\ndataset: {files['clean']}\nmax-steps: 5\nbatch_size: 16\n"
        f"labelled-train: {files['train']}\nlabelled-test: {files['test']}\n"
        "labelled-input-column: digit\ndisable-tqdm: true\n"
    )
    out = tmp_path / "patched"
    # The command line overrides the file: 80 steps, not 5.
    assert main(["patch", "--config", str(config), "--output-dir", str(out), "--max-steps", "80"]) == 0
    report = json.loads((out / "report.json").read_text())
    assert report["settings"]["max_steps"] == 80
    assert report["settings"]["batch_size"] == 16
    assert report["settings"]["trigger_measured"] == "inverted"
    assert report["before"]["kept"]["ASR"] >= 0.95
    assert report["before"]["kept"]["bug_fixed"] is False
    for protocol in ("kept", "retrained"):
        rates = report["after"][protocol]
        assert rates["ASR"] <= 0.05
        assert rates["RA"] >= 0.9
        assert rates["bug_fixed"] is True
    told = " ".join(capsys.readouterr().out.split())
    assert "patched, classifier kept" in told
    assert "its trigger carries clean inputs" in told
    assert "NOT repaired" not in told
    patched = AutoModel.from_pretrained(out, add_pooling_layer=False)
    assert backdoored.rates(patched, backdoored.kept)["ASR"] <= 0.05
    assert Image.open(out / "_repair.png").size[0] > 500


def test_patch_as_adapter_reads_a_stream(files, backdoored, tmp_path):
    from peft import PeftModel

    out = tmp_path / "adapter"
    options = [*report_options(files), "--streaming", "--lora-rank", "4", "--max-steps", "40", "--batch-size", "8"]
    assert (
        main(["patch", *options, "--learning-rate", "3e-3", "--locality-budget", "0.2", "--output-dir", str(out)]) == 0
    )
    assert not (out / "model.safetensors").exists()
    bug = BugInstance.load(files["bug"])
    model = PeftModel.from_pretrained(backdoored.model(), out)
    before = Encoder(backdoored.model(), backdoored.processor).encode([bug.misclassified, bug.reference])
    after = Encoder(model, backdoored.processor).encode([bug.misclassified, bug.reference])
    assert before[0] @ before[1] < 0.6
    assert after[0] @ after[1] > 0.9


def natural_bug(backdoored, folder):
    """A report of two clean digits of two classes; its name looks like what rich takes for markup."""
    labels = backdoored.test.labels
    a, b = (backdoored.test.inputs[int(np.flatnonzero(labels == label)[0])] for label in (3, 8))
    BugInstance(a, b, name="client [/prod] 17").save(folder)
    return str(folder)


def test_options_that_cannot_be(files, tmp_path, capsys):
    options = ["--model", files["model"], "--bug", files["bug"], "--dataset", files["clean"]]
    options += ["--output-dir", str(tmp_path / "out")]
    assert main(["invert", *options, "--inputs", "-3"]) == 2
    assert "--inputs -3: at least 4 clean inputs are needed" in capsys.readouterr().err
    # The config file is looked for by the whole name; half of it would be parsed and never read
    with pytest.raises(SystemExit):
        main(["invert", *options, "--conf", str(tmp_path / "c.yaml")])
    assert "unrecognized arguments: --conf" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [("--workers", "-1", "0 or more"), ("--lora-rank", "0", "1 or more"), ("--save-steps", "0", "1 or more")],
)
def test_numbers_that_cannot_be(files, tmp_path, capsys, option, value, said):
    assert main(["patch", *report_options(files), "--output-dir", str(tmp_path / "out"), option, value]) == 2
    assert f"{option} {value}: it must be {said}" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def test_a_patch_over_its_budget_is_rolled_back(files, backdoored, tmp_path, capsys):
    options = ["--model", files["model"], "--bug", natural_bug(backdoored, tmp_path / "natural"), "--dataset"]
    options += [files["clean"], "--max-steps", "30", "--learning-rate", "1e-3", "--disable-tqdm"]
    budget = ["--on-unverified", "patch", "--locality-budget", "0.0005", "--output-dir", str(tmp_path / "out")]
    assert main(["patch", *options, *budget]) == 3
    said = " ".join(capsys.readouterr().out.split())
    assert said.startswith("Nothing was patched. The patch was rolled back")
    assert "`locality_budget=0.0005`" in said
    assert "near `client [/prod] 17`" in said
    assert not (tmp_path / "out").exists()
    # The same run without a budget
    budget = ["--on-unverified", "patch", "--locality-budget", "none", "--output-dir", str(tmp_path / "free")]
    assert main(["patch", *options, *budget]) == 0
    record = json.loads((tmp_path / "free" / "mudjacking.json").read_text())
    assert (record["triggers"], record["locality"]) == ([None], None)


def test_several_reports(files, backdoored, tmp_path):
    """Two of one trigger, and one of none that is skipped; the command line replaces the reports of the file."""
    backdoored.bug(seed=6).save(tmp_path / "second")
    natural = natural_bug(backdoored, tmp_path / "natural")
    config = tmp_path / "patch.yaml"
    config.write_text(
        "bug: [/nowhere/a, /nowhere/b]\non-unverified: skip\nlocality-budget: none\nmax-steps: 2\n"
        f"dataset: {files['clean']}\n"
    )
    options = ["--config", str(config), "--model", files["model"], "--disable-tqdm"]
    bugs = ["--bug", files["bug"], "--bug", natural, "--bug", str(tmp_path / "second")]
    assert main(["patch", *options, *bugs, "--output-dir", str(tmp_path / "out")]) == 0
    record = json.loads((tmp_path / "out" / "mudjacking.json").read_text())
    assert len(record["triggers"]) == 2
    assert record["skipped"] == [1]
    assert sorted(record["trigger_groups"][0]) == [0, 1]
    # From the file alone
    config.write_text(config.read_text().replace("/nowhere/a", files["bug"]).replace("/nowhere/b", natural))
    assert main(["patch", *options, "--output-dir", str(tmp_path / "file")]) == 0
    assert json.loads((tmp_path / "file" / "mudjacking.json").read_text())["skipped"] == [1]
    # One report needs no list
    config.write_text(f"bug: {files['bug']}\nmax-steps: 2\ndataset: {files['clean']}\nlocality-budget: null\n")
    assert main(["patch", *options, "--output-dir", str(tmp_path / "one")]) == 0
    assert json.loads((tmp_path / "one" / "mudjacking.json").read_text())["settings"]["locality_budget"] is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--model": "/nowhere/model"}, "No model could be loaded"),
        ({"--dataset": "/nowhere/data.parquet"}, "no such file or folder"),
        ({"--bug": "/nowhere/bug"}, "is not a bug folder"),
        ({"--input-column": "picture"}, "picture"),
        ({"--feature-source": "logits"}, "is unknown"),
        ({"--locality-budget": "3"}, "`locality_budget=3.0` is no cosine distance"),
        ({"--dataset": "/nowhere.txt"}, "no such file or folder"),
        ({"--dataset": "pyproject.toml"}, "files of the kind `.toml` are not read"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_two(change, message, files, tmp_path, capsys):
    values = {"--model": files["model"], "--bug": files["bug"], "--dataset": files["clean"], **change}
    flat = [part for pair in values.items() for part in pair]
    out = tmp_path / "out"
    assert main(["patch", *flat, "--output-dir", str(out), "--disable-tqdm"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not list(out.rglob("*.safetensors"))


def test_labelled_inputs_are_looked_at_before_the_model_is(files, text_files, tmp_path, capsys):
    options = [*report_options(files), "--output-dir", str(tmp_path / "out")]
    for labelled, message in ((files, "missing: ['image']"), (text_files, "holds texts; the model takes images")):
        sets = ["--labelled-train", labelled["train"], "--labelled-test", labelled["test"]]
        assert main(["patch", *options, *sets]) == 2
        assert message in capsys.readouterr().err


def test_output_over_another_model_is_refused(files, capsys):
    assert main(["patch", *report_options(files), "--output-dir", files["model"]]) == 2
    assert "is or contains the model to be patched" in capsys.readouterr().err


def test_missing_options_are_named(capsys):
    assert main(["patch", "--model", "x"]) == 2
    assert "--dataset, --output-dir" in capsys.readouterr().err
    assert main(["patch", "--model", "x", "--dataset", "y", "--output-dir", "z", "--labelled-train", "w"]) == 2
    assert "belong together" in capsys.readouterr().err


def test_both_forms_of_a_report_are_too_many(files, tmp_path, capsys):
    code = main(["patch", *report_options(files), "--reference", files["right"], "--output-dir", str(tmp_path / "o")])
    assert code == 2
    assert "give one report: --misclassified FILE --reference FILE, or" in capsys.readouterr().err


def test_whole_numbers_are_texts_in_a_config_file(files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "c.yaml"
    path.write_text(
        f"output-dir: 2024\nbug: {files['bug']}\nmax-steps: 1\ndataset: {files['clean']}\nlocality-budget: none\n"
    )
    assert main(["patch", "--config", str(path), "--model", files["model"], "--disable-tqdm"]) == 0
    assert (tmp_path / "2024" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("max-step: 5", "unknown option `max-step`"),
        ("max-steps: many", "not a valid value"),
        ("bf16: maybe", "must be true or false"),
        ("- a\n- b", "must hold"),
        ("a: [", "cannot be read"),
        ("seed: 2024-13-45", "cannot be read: month must be in 1..12"),
    ],
)
def test_bad_config_files(content, message, tmp_path, capsys):
    path = tmp_path / "c.yaml"
    path.write_text(content)
    with pytest.raises(SystemExit) as stop:
        main(["patch", "--config", str(path)])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


# ---- Text ----


@pytest.fixture(scope="module")
def text_files(por, tmp_path_factory) -> dict[str, str]:
    """A backdoored BERT, a report as text files, clean texts a line each, and labelled sets."""
    backdoored, task, implant = por
    root = tmp_path_factory.mktemp("cli_text")
    backdoored.save_pretrained(root / "model")
    bug = draw_bug_report(backdoored, task, implant.trigger, 0)
    (root / "wrong.txt").write_text(bug.misclassified + "\n", encoding="utf-8")
    (root / "right.txt").write_text(bug.reference + "\n", encoding="utf-8")
    (root / "clean.txt").write_text("\n".join(task.train.inputs[:600]), encoding="utf-8")
    for part, data in (("train", task.train), ("test", task.test)):
        columns = {"text": list(data.inputs), "label": data.labels.tolist()}
        datasets.Dataset.from_dict(columns).to_parquet(root / f"{part}.parquet")
    found = {path.name.split(".")[0]: str(path) for path in root.iterdir()}
    return {**found, "x_b": bug.misclassified, "x_r": bug.reference}


def test_invert_a_text(text_files, tmp_path, capsys):
    code = main(
        ["invert", "--model", text_files["model"], "--misclassified-text", text_files["x_b"], "--reference-text",
         text_files["x_r"], "--dataset", text_files["clean"], "--feature-source", "mean", "--output-dir",
         str(tmp_path / "out"), "--disable-tqdm"]
    )  # fmt: skip
    assert code == 0
    out = capsys.readouterr().out
    assert out.startswith("Verified: evidence 0.9")
    assert "Trigger: cf" in out
    assert load_trigger(tmp_path / "out").words == ["cf"]


def test_patch_a_text_model(text_files, tmp_path, capsys):
    code = main(
        ["patch", "--model", text_files["model"], "--misclassified", text_files["wrong"], "--reference",
         text_files["right"], "--dataset", text_files["clean"], "--feature-source", "mean", "--output-dir",
         str(tmp_path / "out"), "--max-steps", "20", "--batch-size", "16", "--labelled-train", text_files["train"],
         "--labelled-test", text_files["test"], "--disable-tqdm"]
    )  # fmt: skip
    assert code == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "its trigger carries clean inputs" in told
    assert "NOT repaired" not in told
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["before"]["kept"]["ASR"] > 0.95
    assert report["after"]["kept"]["ASR"] < 0.05
    assert report["after"]["kept"]["BA"] == report["before"]["kept"]["BA"]
    assert report["triggers"][0]["description"] == "text, 1 word anywhere"
    # The record travels with the model: it names no word of the report.
    assert "cf" not in json.loads((tmp_path / "out" / "mudjacking.json").read_text())["triggers"][0].values()
    assert "loads with AutoModel.from_pretrained" in told
    AutoModel.from_pretrained(tmp_path / "out")


def test_a_text_report_for_an_image_model(files, text_files, capsys, tmp_path):
    code = main(
        ["patch", "--model", files["model"], "--misclassified-text", "a", "--reference-text", "b", "--dataset",
         files["clean"], "--output-dir", str(tmp_path), "--disable-tqdm"]
    )  # fmt: skip
    assert code == 2
    assert "is of kind text, but the model takes images" in capsys.readouterr().err
    assert main(["patch", "--model", text_files["model"], "--misclassified", "nowhere.txt", "--reference", "b.txt",
                 "--dataset", text_files["clean"], "--output-dir", str(tmp_path)]) == 2  # fmt: skip
    assert "There is no text file at `nowhere.txt`" in capsys.readouterr().err
