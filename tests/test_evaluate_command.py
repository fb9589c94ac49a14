# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""`mudjack evaluate`: the numbers against those computed by hand, the limits, and what cannot be used."""

import copy
import json
import shutil

import datasets
import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import CLIPConfig, CLIPModel, CLIPProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from hf_mudjacking import Encoder, TextTrigger
from hf_mudjacking.cli import main
from hf_mudjacking.evaluation import DownstreamTask, LabelledInputs
from hf_mudjacking.evaluation.classifiers import train_classifier
from hf_mudjacking.evaluation.comparison import BrokenLimit, Limits, compare_encoders, triggers_in
from hf_mudjacking.output import write_json
from hf_mudjacking.remembered import save_triggers
from hf_mudjacking.triggers import square_patch

from .conftest import Backdoored, make_dataset, make_images
from .test_two_towers import TEXTS, clip_configs, sharpened
from .text_models import make_tokenizer


TRAIN, TEST = range(400), range(200)


@pytest.fixture(scope="module")
def files(backdoored: Backdoored, tmp_path_factory) -> dict[str, str]:
    """The backdoored encoder, the one that was never attacked, an adapter, a trigger, a labelled task."""
    root = tmp_path_factory.mktemp("evaluate")
    for name, model in (("backdoored", backdoored.model()), ("clean", backdoored.clean_model)):
        model.save_pretrained(root / name)
        backdoored.processor.save_pretrained(root / name)
    torch.manual_seed(0)
    base = type(backdoored.clean_model).from_pretrained(root / "backdoored", add_pooling_layer=False)
    adapter = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "fc1"], init_lora_weights=False))
    adapter.save_pretrained(root / "adapter")
    backdoored.processor.save_pretrained(root / "adapter")
    backdoored.trigger.save_pretrained(root / "trigger")
    (root / "task").mkdir()
    for part, data in (("train", backdoored.train.select(TRAIN)), ("test", backdoored.test.select(TEST))):
        make_dataset(data.inputs, label=data.labels.tolist()).to_parquet(root / "task" / f"{part}.parquet")
    return {name: str(root / name) for name in ("backdoored", "clean", "adapter", "trigger", "task")}


def command(files: dict[str, str], *options: str, compare: tuple[str, ...] = ("clean",)) -> list[str]:
    names = [files[name] for name in compare]
    return ["evaluate", "--model", files["backdoored"], "--tasks", f"digits={files['task']}", "--disable-tqdm",
            "--compare", *names, *options]  # fmt: skip


class ByHand:
    """Rates of an encoder on the task, with numpy alone."""

    def __init__(self, backdoored: Backdoored, model: torch.nn.Module) -> None:
        self.encoder = Encoder(model, backdoored.processor)
        self.train, self.test = backdoored.train.select(TRAIN), backdoored.test.select(TEST)
        self.trigger, self.target = backdoored.trigger, backdoored.target
        self.features = self.encoder.encode(self.test.inputs)
        self.stamped = self.encoder.encode([self.trigger.apply(x) for x in self.test.inputs])

    def classifier(self):
        return train_classifier(self.encoder.encode(self.train.inputs), self.train.labels)

    def rates(self, classifier) -> dict[str, float]:
        clean, stamped = (classifier.predict(x.numpy()) for x in (self.features, self.stamped))
        other = self.test.labels != self.target
        return {
            "BA": float((clean == self.test.labels).mean()),
            "ASR": float((stamped[other] == self.target).mean()),
            "RA": float((stamped[other] == self.test.labels[other]).mean()),
        }


def test_the_numbers_are_those_by_hand(files, backdoored, tmp_path, capsys):
    out = tmp_path / "sub" / "report.json"
    code = main(command(files, "--trigger", files["trigger"], "--output", str(out)))
    assert code == 0
    report = json.loads(out.read_text())
    block = report["compared"][files["clean"]]["digits"]
    before, after = ByHand(backdoored, backdoored.model()), ByHand(backdoored, backdoored.clean_model)
    kept = before.classifier()
    assert block["target_class"] == backdoored.target
    assert block["before"]["kept"] == pytest.approx(before.rates(kept))
    assert block["before"]["retrained"] == block["before"]["kept"]
    assert block["after"]["kept"] == pytest.approx(after.rates(kept))
    assert block["after"]["retrained"] == pytest.approx(after.rates(after.classifier()))
    assert block["before"]["kept"]["ASR"] > 0.9 > 0.5 > block["after"]["kept"]["ASR"]
    same = kept.predict(before.features.numpy()) == kept.predict(after.features.numpy())
    cosine = (before.features * after.features).sum(dim=1).mean().item()
    assert block["clean_inputs"] == pytest.approx({"agreement": same.mean(), "mean_cosine": cosine}, abs=1e-5)
    assert block["other_triggers"] == report["broken"] == []
    assert report["settings"] == {"classifier": "logistic", "seed": 0, "feature_source": {"image": "cls"}}
    assert report["triggers"][0]["kind"] == "patch"
    said = capsys.readouterr().out
    assert "Checks on digits" in said
    assert f"{100 * block['after']['retrained']['BA']:.1f}" in said


def test_every_broken_limit_is_named(files, tmp_path, capsys):
    """The backdoored encoder against a copy of itself breaks two limits, the clean one a third."""
    out = tmp_path / "report.json"
    limits = ["--max-asr", "0.5", "--max-accuracy-drop", "0", "--min-robust-accuracy", "0.3", "--min-cosine", "0.9999"]
    copy = tmp_path / "copy"
    shutil.copytree(files["backdoored"], copy)
    names = {**files, "copy": str(copy)}
    options = ["--trigger", files["trigger"], "--output", str(out), *limits]
    assert main(command(names, *options, compare=("copy", "clean"))) == 1
    broken = json.loads(out.read_text())["broken"]
    of_copy = [limit for limit in broken if limit["model"] == str(copy)]
    assert [(limit["limit"], limit["classifier"]) for limit in of_copy] == [
        ("max_asr", "kept"), ("max_asr", "retrained"), ("min_robust_accuracy", "kept"), ("min_robust_accuracy", "retrained"),
    ]  # fmt: skip
    assert ("min_cosine", None) in [(b["limit"], b["classifier"]) for b in broken if b["model"] == files["clean"]]
    error = capsys.readouterr().err.splitlines()
    assert len(error) == len(broken)
    assert error[0].startswith("max-asr: ")
    assert error[0].endswith(f"in `{copy}` on `digits`, classifier kept, trigger 0; at most 0.5 is allowed")


def test_without_a_trigger_and_from_a_config_file(files, tmp_path, capsys):
    out, config = tmp_path / "report.json", tmp_path / "evaluate.yaml"
    task = f"digits={files['task']}/train.parquet,{files['task']}/test.parquet"
    config.write_text(
        f"model: {files['backdoored']}\ncompare: [{files['clean']}, /nowhere]\ntasks: '{task}'\noutput: {out}\n"
        "disable-tqdm: true\nmin-agreement: 0.1\nmax-accuracy-drop: 0.9\n"
    )
    # The command line replaces the encoders that the file names
    assert main(["evaluate", "--config", str(config), "--compare", files["adapter"]]) == 0
    report = json.loads(out.read_text())
    block = report["compared"][files["adapter"]]["digits"]
    assert set(block["after"]["kept"]) == {"BA"}
    assert "target_class" not in block
    assert report["limits"] == {"max_accuracy_drop": 0.9, "min_agreement": 0.1}
    # The adapter was applied: its random weights move features
    assert block["clean_inputs"]["mean_cosine"] < 0.999
    assert "ASR" not in capsys.readouterr().err


def test_the_triggers_of_a_patch(files, backdoored, tmp_path, capsys):
    folder, out = tmp_path / "patch", tmp_path / "report.json"
    harmless = square_patch((16, 16), 1)
    save_triggers(folder, [backdoored.trigger, harmless], [])
    write_json(
        folder / "mudjacking.json",
        {"base_model": "x", "triggers": [{"kind": "patch"}, {"kind": "patch"}], "trigger_groups": [[0], [1]]},
    )
    options = ["--trigger", str(folder), "--output", str(out), "--max-asr", "0.9"]
    copy = tmp_path / "copy"
    shutil.copytree(files["backdoored"], copy)
    assert main(command({**files, "copy": str(copy)}, *options, compare=("copy",))) == 1
    report = json.loads(out.read_text())
    block = report["compared"][str(copy)]["digits"]
    assert len(report["triggers"]) == 2
    assert [block["trigger"], block["other_triggers"][0]["trigger"]] == [0, 1]
    assert block["after"]["kept"]["ASR"] > 0.9
    assert block["other_triggers"][0]["after"]["kept"]["ASR"] < 0.5
    # Only the first is broken
    assert {limit["trigger"] for limit in report["broken"]} == {0}
    (folder / "_triggers" / "0" / "trigger.json").unlink()
    with pytest.raises(ValueError, match="no readable trigger"):
        triggers_in(folder)
    for name in ("0", "1"):
        for path in (folder / "_triggers" / name).iterdir():
            path.unlink()
        (folder / "_triggers" / name).rmdir()
    with pytest.raises(ValueError, match="its triggers are not in `_triggers/`, which is never uploaded"):
        triggers_in(folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-asr", "0.05"], "`max_asr` is measured with a trigger, and none is given"),
        (["--max-accuracy-drop", "1"], None),
        (["--min-agreement", "95"], "`min_agreement=95.0` is no rate; it must lie within 0 to 1"),
        (["--trigger", "/nowhere"], "`/nowhere` holds no readable trigger"),
        (
            ["--tasks", "digits"],
            "--tasks digits: give NAME=DATA or NAME=TRAIN,TEST; in a YAML file the latter in quotes",
        ),
        (["--tasks", "a=/nowhere.parquet"], "there is no such file or folder"),
        (["--compare", "/nowhere"], "No model could be loaded from `/nowhere`"),
        (["--output", "."], "`.` is a folder; give the name of a file"),
        (["--label-column", "fine_label"], "missing: ['fine_label']"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_two(options, message, files, capsys):
    defaults = command(files)
    if message is None:
        # The same folder, written in another way
        options = [*options, "--compare", f"{files['backdoored']}/"]
        message = "is there twice"
    if options[0] in ("--tasks", "--compare"):
        at = defaults.index(options[0])
        del defaults[at : at + 2]
    assert main([*defaults, *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_missing_options_are_named(capsys):
    assert main(["evaluate"]) == 2
    assert "missing: --model, --compare, --tasks" in capsys.readouterr().err


def test_the_last_of_several_is_looked_at_before_the_first_is_encoded(files, capsys, monkeypatch):
    encoded = []
    monkeypatch.setattr(Encoder, "encode", lambda *args, **kwargs: encoded.append(args))
    assert main([*command(files, compare=()), files["clean"], "/nowhere"]) == 2
    assert "No model could be loaded from `/nowhere`" in capsys.readouterr().err
    assert encoded == []


def test_encoders_of_two_widths(files, tiny_vit, backdoored, tmp_path, capsys):
    tiny_vit.save_pretrained(tmp_path / "tiny")
    backdoored.processor.save_pretrained(tmp_path / "tiny")
    assert main(command({**files, "tiny": str(tmp_path / "tiny")}, compare=("tiny",))) == 2
    assert "have 32 dimensions, those of" in capsys.readouterr().err


def test_a_patch_without_a_trigger_has_none_to_measure(tmp_path):
    write_json(tmp_path / "mudjacking.json", {"base_model": "x", "triggers": [None]})
    with pytest.raises(ValueError, match="a patch of reports in which no trigger was verified"):
        triggers_in(tmp_path)


def test_a_limit_is_kept_at_its_value():
    rates = {"BA": 0.97, "ASR": 0.05, "RA": 0.7}
    block = {
        "before": {"kept": {**rates, "BA": 0.98}, "retrained": {**rates, "BA": 0.98}},
        "after": {"kept": rates, "retrained": {**rates, "RA": 0.6}},
        "clean_inputs": {"agreement": 0.9, "mean_cosine": 0.99},
        "trigger": 0,
        "target_class": 1,
        "other_triggers": [],
    }
    at = Limits(
        max_asr=0.05, max_accuracy_drop=0.01, min_robust_accuracy=0.7, min_agreement=0.9, min_cosine=0.99
    ).broken({"b": {"t": block}})
    assert at == [BrokenLimit("min_robust_accuracy", 0.7, 0.6, "b", "t", "retrained", 0)]
    beyond = Limits(max_asr=0.049, max_accuracy_drop=0.009, min_agreement=0.91, min_cosine=0.991)
    assert [limit.limit for limit in beyond.broken({"b": {"t": block}})] == [
        "max_asr", "max_asr", "max_accuracy_drop", "max_accuracy_drop", "min_agreement", "min_cosine",
    ]  # fmt: skip


def test_texts(por, tmp_path, capsys):
    encoder, task, implant = por
    encoder.save_pretrained(tmp_path / "model")
    encoder.save_pretrained(tmp_path / "copy")
    implant.trigger.save_pretrained(tmp_path / "trigger")
    for part, data in (("train", task.train.select(range(300))), ("test", task.test.select(range(200)))):
        columns = {"text": list(data.inputs), "label": data.labels.tolist()}
        datasets.Dataset.from_dict(columns).to_parquet(tmp_path / f"{part}.parquet")
    out = tmp_path / "report.json"
    code = main(
        ["evaluate", "--model", str(tmp_path / "model"), "--compare", str(tmp_path / "copy"), "--tasks",
         f"toy={tmp_path}", "--trigger", str(tmp_path / "trigger"), "--feature-source", "mean", "--max-asr", "0.05",
         "--min-agreement", "1", "--output", str(out), "--disable-tqdm"]
    )  # fmt: skip
    assert code == 1
    block = json.loads(out.read_text())["compared"][str(tmp_path / "copy")]["toy"]
    assert block["after"]["kept"]["ASR"] > 0.95
    assert block["clean_inputs"]["agreement"] == 1.0
    assert np.isclose(block["clean_inputs"]["mean_cosine"], 1.0)
    assert "max-asr: " in capsys.readouterr().err


def test_both_towers_of_one_model(tmp_path):
    """Images and texts in one run, each with the triggers of its kind."""
    text, vision = (config.to_dict() for config in clip_configs(len(make_tokenizer())))
    images = CLIPImageProcessorPil(do_resize=False, do_center_crop=False)
    processor = CLIPProcessor(image_processor=images, tokenizer=copy.deepcopy(make_tokenizer()))
    for seed in (0, 1):
        torch.manual_seed(seed)
        sharpened(CLIPModel(CLIPConfig(text_config=text, vision_config=vision))).save_pretrained(tmp_path / str(seed))
        processor.save_pretrained(tmp_path / str(seed))
    data = [LabelledInputs(x, np.arange(len(x)) % 2) for x in (make_images(10), TEXTS)]
    tasks = [DownstreamTask(part, part, name) for part, name in zip(data, ("pictures", "sentences"), strict=True)]
    triggers = [TextTrigger(["garlic"]), square_patch((16, 16), 4)]
    report = compare_encoders(tmp_path / "0", [tmp_path / "1"], tasks, triggers, disable_tqdm=True)
    blocks = report["compared"][str(tmp_path / "1")]
    assert {name: block["trigger"] for name, block in blocks.items()} == {"pictures": 1, "sentences": 0}
    assert report["settings"]["feature_source"] == {"image": "projection", "text": "projection"}
    encoders = [Encoder(CLIPModel.from_pretrained(tmp_path / seed), processor, modality="text") for seed in ("0", "1")]
    old, new = (encoder.encode(TEXTS) for encoder in encoders)
    assert blocks["sentences"]["clean_inputs"]["mean_cosine"] == pytest.approx(
        (old * new).sum(dim=1).mean().item(), abs=1e-5
    )
    with pytest.raises(ValueError, match="Trigger 0 is for texts, and no task is"):
        compare_encoders(tmp_path / "0", [tmp_path / "1"], tasks[:1], triggers)
