# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hf_mudjacking.loading import load_model
from hf_mudjacking.output import (
    check_output_dir,
    check_output_file,
    complete_checkpoints,
    staged,
    write_json,
)
from hf_mudjacking.patch_record import check_whole, read_record
from hf_mudjacking.patches import apply_patch
from hf_mudjacking.published import published_files


def _names(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_staged_files_appear_and_replace(tmp_path):
    (tmp_path / "a.txt").write_text("old")
    (tmp_path / "other.txt").write_text("other")
    with staged(tmp_path) as staging:
        (staging / "a.txt").write_text("new")
        (staging / "sub" / "deep").mkdir(parents=True)
        (staging / "sub" / "deep" / "b.txt").write_text("b")
        assert (tmp_path / "a.txt").read_text() == "old"
        assert not (tmp_path / "sub").exists()
    assert (tmp_path / "a.txt").read_text() == "new"
    assert _names(tmp_path) == ["a.txt", "other.txt", "sub/deep/b.txt"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "other.txt", "sub"]


def test_no_empty_folder_stays_of_what_is_replaced(tmp_path):
    """One in `_triggers` would pass for a trigger without its files."""
    patterns = ("_triggers/*/*",)
    for names in (("0", "remembered-0"), ("0",)):
        with staged(tmp_path / "out", replaces=patterns) as staging:
            for name in names:
                (staging / "_triggers" / name).mkdir(parents=True)
                (staging / "_triggers" / name / "trigger.json").write_text(name)
    assert [path.name for path in (tmp_path / "out" / "_triggers").iterdir()] == ["0"]
    with staged(tmp_path / "out", replaces=patterns):
        pass
    assert (tmp_path / "out").exists()
    assert list((tmp_path / "out").iterdir()) == []


def test_folders_of_others_stay_within_what_is_replaced(tmp_path):
    notebook = tmp_path / "_triggers" / "0" / ".ipynb_checkpoints"
    notebook.mkdir(parents=True)
    (tmp_path / "_triggers" / "0" / "trigger.json").write_text("old")
    with staged(tmp_path, replaces=("_triggers/*/*",)) as staging:
        (staging / "config.json").write_text("new")
    assert notebook.is_dir()
    assert not (tmp_path / "_triggers" / "0" / "trigger.json").exists()


def test_an_error_leaves_what_was_there(tmp_path):
    (tmp_path / "a.txt").write_text("old")

    def save(folder):
        with staged(folder) as staging:
            (staging / "a.txt").write_text("new")
            raise RuntimeError("midway")

    for folder in (tmp_path, tmp_path / "was not there"):
        with pytest.raises(RuntimeError, match="midway"):
            save(folder)
    assert (tmp_path / "a.txt").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("moved", range(4))
def test_a_patch_that_a_killed_process_left_in_parts_is_refused(moved, tmp_path, monkeypatch):
    """A record that went first named weights that were not there yet: those of an earlier patch were pushed under it."""

    def save(lr):
        with staged(tmp_path, replaces=("model*.safetensors",)) as staging:
            for name in ("model.safetensors", "config.json"):
                (staging / name).write_text(f"{lr}")
            write_json(
                staging / "mudjacking.json", {"base_model": "a", "kind": "full", "settings": {"learning_rate": lr}}
            )

    save(1)
    check_whole(tmp_path, read_record(tmp_path))
    count, replace = [0], os.replace

    def killed(source, target):
        if Path(target).parent == tmp_path:
            if count[0] == moved:
                raise KeyboardInterrupt
            count[0] += 1
        replace(source, target)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        save(2)
    monkeypatch.undo()
    contents = {(tmp_path / name).read_text() for name in ("model.safetensors", "config.json")}
    record = read_record(tmp_path)
    if moved == 0:
        assert contents == {"1"}
        assert record["settings"] == {"learning_rate": 1}
        check_whole(tmp_path, record)
        return
    for refuse in (published_files, load_model, lambda folder: apply_patch(folder, "base", tmp_path / "out")):
        with pytest.raises(ValueError, match=r"was being written when the process ended.*Write it again"):
            refuse(tmp_path)
    save(3)
    check_whole(tmp_path, read_record(tmp_path))


def test_two_that_write_to_one_folder_do_not_disturb_each_other(tmp_path):
    with staged(tmp_path) as first:
        (first / "a.txt").write_text("a")
        write_json(tmp_path / "b.json", {"b": 1})
    assert _names(tmp_path) == ["a.txt", "b.json"]


def test_what_a_killed_process_left_goes_and_what_others_have_stays(tmp_path):
    with staged(tmp_path) as staging:
        own = staging.name
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    left = own.replace(f"-{os.getpid()}-", f"-{dead.pid}-")
    kept = ["_staging-data", "_staging-another_machine-1-x", own]
    for name in (left, *kept):
        (tmp_path / name).mkdir()
    write_json(tmp_path / "a.json", {})
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == sorted(kept)


def test_write_json(tmp_path):
    write_json(tmp_path / "deep" / "r.json", {"a": 1})
    assert json.loads((tmp_path / "deep" / "r.json").read_text()) == {"a": 1}
    with pytest.raises(TypeError):
        write_json(tmp_path / "deep" / "r.json", {"a": object()})
    assert json.loads((tmp_path / "deep" / "r.json").read_text()) == {"a": 1}
    assert _names(tmp_path) == ["deep/r.json"]


def test_output_dir_that_may_be_used(tmp_path):
    check_output_dir(tmp_path / "new", "org/model")
    check_output_dir(tmp_path, "org/model")
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "checkpoint-6").mkdir()
    (tmp_path / "checkpoint-6" / "model.safetensors").write_text("")
    write_json(tmp_path / "checkpoint-6" / "mudjacking.json", {"base_model": "org/model"})
    check_output_dir(tmp_path, "org/model")
    (tmp_path / "model.safetensors").write_text("")
    write_json(tmp_path / "mudjacking.json", {"base_model": "org/model"})
    check_output_dir(tmp_path, "org/model")


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "adapter_config.json",
        "model-00001-of-2.safetensors",
        "pytorch_model.bin",
        "m.gguf",
        "flax.msgpack",
    ],
)
def test_output_dir_with_a_foreign_model(tmp_path, name):
    (tmp_path / name).write_text("{}")
    with pytest.raises(ValueError, match=rf"holds another model \({name}\)"):
        check_output_dir(tmp_path, "org/model")


@pytest.mark.parametrize("record", ["", "[]", "{"])
def test_output_dir_with_a_damaged_record(tmp_path, record):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "mudjacking.json").write_text(record)
    assert read_record(tmp_path) is None
    with pytest.raises(ValueError, match="holds another model"):
        check_output_dir(tmp_path, "org/model")


def test_output_dir_with_the_patch_of_another_model(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    write_json(tmp_path / "mudjacking.json", {"base_model": "org/first"})
    with pytest.raises(ValueError, match="a patch of `org/first`, not of `org/second`"):
        check_output_dir(tmp_path, "org/second")


def test_output_dir_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        check_output_dir(tmp_path / "file", "org/model")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="the place that nobody may write to is Linux'")
def test_a_place_that_cannot_be_written_to_is_told_before_the_work():
    with pytest.raises(ValueError, match="`/proc/patched` cannot be written to"):
        check_output_dir("/proc/patched", "m")
    with pytest.raises(ValueError, match="`/proc` cannot be written to"):
        check_output_file("/proc/report.json")


def test_output_file(tmp_path, monkeypatch):
    check_output_file(tmp_path / "new" / "report.json")
    assert list(tmp_path.iterdir()) == [], "nothing is made by asking"
    monkeypatch.chdir(tmp_path)
    check_output_file("report.json")
    with pytest.raises(ValueError, match="is a folder; give the name of a file"):
        check_output_file(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="cannot be written to"):
        check_output_file(tmp_path / "file" / "report.json")


def test_complete_checkpoints(tmp_path):
    for name, state in {
        "checkpoint-20": '{"global_step": 20}',
        "checkpoint-100": '{"global_step": 100}',
        "checkpoint-3": '{"global_step": 3}',
        "checkpoint-40": '{"global_step": 4',
        "checkpoint-50": "",
        "checkpoint-60": None,
        "checkpoint-last": "{}",
        "other-70": "{}",
    }.items():
        (tmp_path / name).mkdir()
        if state is not None:
            (tmp_path / name / "trainer_state.json").write_text(state)
    found = complete_checkpoints(tmp_path)
    assert [path.name for path in found] == ["checkpoint-3", "checkpoint-20", "checkpoint-100"]
    assert complete_checkpoints(tmp_path / "nowhere") == []


def test_one_folder_by_several_names_is_one_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "vit").mkdir()
    (tmp_path / "other").mkdir()
    write_json(tmp_path / "out" / "mudjacking.json", {"base_model": "vit"})
    (tmp_path / "out" / "model.safetensors").write_text("")
    for name in ("vit", "./vit", "vit/", str(tmp_path / "vit")):
        check_output_dir("out", name)
    for name in ("other", "org/vit"):
        with pytest.raises(ValueError, match="holds a patch of `vit`"):
            check_output_dir("out", name)
