# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""Runs of two processes that are killed, and what counts as a checkpoint afterwards."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hf_mudjacking import MudjackingTrainer
from hf_mudjacking.output import RECORD_FILE, complete_checkpoints

from .conftest import make_config


ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_what_is_killed_resumes_to_the_same_result(backdoored, tmp_path):
    """Two points, the first in a save; the script tries twenty."""
    data, output = tmp_path / "data", tmp_path / "result.json"
    backdoored.model().save_pretrained(data / "vit")
    backdoored.processor.save_pretrained(data / "vit")
    backdoored.bug(seed=8).save(data / "bug")
    (data / "clean").mkdir()
    for i, image in enumerate(backdoored.train.inputs[:160]):
        image.save(data / "clean" / f"{i:03}.png")
    script = ROOT / "examples" / "benchmarks" / "kill_and_resume.py"
    finished = subprocess.run(
        [sys.executable, str(script), "--data", str(data), "--points", "2", "--output", str(output)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), *sys.path])},
        capture_output=True, text=True, check=False, timeout=250,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr[-4000:]
    result = json.loads(output.read_text())
    assert result["settings"]["processes"] == 2
    assert result["passed"] == len(result["points"]) == 2
    first, second = (point["interruptions"] for point in result["points"])
    assert first[0]["died"]
    assert second[0]["died"]
    assert "save" in first[0]["kill"]
    # How much of a checkpoint is there by then depends on the operation that was drawn
    assert first[0]["goes_on_from"] not in first[0]["incomplete"]
    assert "step" in second[0]["kill"]


def checkpoint(folder, processes, files):
    folder.mkdir()
    (folder / "trainer_state.json").write_text("{}")
    (folder / RECORD_FILE).write_text(json.dumps({"base_model": "a", "processes": processes}))
    for name in files:
        (folder / name).touch()
    return folder


def test_a_checkpoint_without_the_random_state_of_each_process_is_incomplete(tmp_path):
    whole = [
        checkpoint(tmp_path / "checkpoint-1", 1, ["rng_state.pth"]),
        checkpoint(tmp_path / "checkpoint-2", 2, ["rng_state_0.pth", "rng_state_1.pth"]),
        checkpoint(tmp_path / "checkpoint-3", 2, []),  # `save_only_model`
    ]
    checkpoint(tmp_path / "checkpoint-4", 2, ["rng_state_0.pth"])
    checkpoint(tmp_path / "checkpoint-5", 3, ["rng_state_0.pth", "rng_state_2.pth"])
    assert complete_checkpoints(tmp_path) == whole


@pytest.fixture
def trainer(tiny_vit, processor, bug, trigger, dataset, tmp_path):
    args = make_config(tmp_path / "out", max_steps=2, save_strategy="steps", save_steps=1)
    return MudjackingTrainer(tiny_vit, args, [bug], dataset, processing_class=processor, triggers=[trigger])


def test_a_checkpoint_that_is_being_removed_is_incomplete(trainer, monkeypatch):
    """One of the same step is there when a run goes on from an earlier one; the process dies after half of the removal."""
    trainer.train()
    first, second = complete_checkpoints(trainer.args.output_dir)

    def die(folder, *args, **kwargs):
        (Path(folder) / "optimizer.pt").unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", die)
    with pytest.raises(KeyboardInterrupt):
        trainer.train(resume_from_checkpoint=str(first))
    assert second.exists()
    assert complete_checkpoints(trainer.args.output_dir) == [first]


def test_the_record_of_a_resumed_run_keeps_the_verdicts(backdoored, tmp_path):
    def trainer():
        args = make_config(tmp_path / "out", max_steps=2, save_strategy="steps", save_steps=1)
        return MudjackingTrainer(
            backdoored.model(), args, [backdoored.bug(seed=8)], backdoored.dataset(64),
            processing_class=backdoored.processor,
        )  # fmt: skip

    trainer().train()
    first, second = complete_checkpoints(tmp_path / "out")
    whole = json.loads((second / RECORD_FILE).read_text())
    assert whole["screenings"]
    shutil.rmtree(second)
    resumed = trainer()
    resumed.train(resume_from_checkpoint=str(first))
    assert json.loads((second / RECORD_FILE).read_text()) == whole
