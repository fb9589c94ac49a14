# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""The benchmark of speed counts the work as it says, and refuses what it cannot do."""

import json
from pathlib import Path

import pytest
import torch


FOLDER = Path(__file__).parents[1] / "examples" / "benchmarks"


@pytest.fixture
def speed(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import speed

    return speed


def test_quick_run_and_its_table(speed, tmp_path, capsys):
    output = tmp_path / "speed.json"
    assert speed.main(["--quick", "--only", "steps", "--output", str(output)]) == 0
    rows = json.loads(output.read_text(encoding="utf-8"))["parts"]["steps"]["rows"]
    # B = 4: 6B + 9 passes; of the frozen model B + 1 more; a view of x_b, x_r and x_r ⊕ e for each input; 17B
    assert [row["forward_equivalents"] for row in rows] == [[33, 38], [33, 33], [33, 60], [33, 68]]
    capsys.readouterr()
    assert speed.main(["--table", "--output", str(output)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + len(rows)
    assert lines[2].startswith(f"| Stored frozen features | {rows[0]['with']:.4g} | ")


def test_all_ways_of_a_step_start_from_the_same_losses(speed):
    """What is left out changes the cost alone: without augmentation each way has the same gradient."""
    import speed_steps

    bench = speed_steps.Bench("quick", 4)
    gradients = []
    for way in ({}, {"stored": False}, {"joint": False}, {"one_view": False}):
        step = speed_steps.Step(bench, 4, **way)
        step()
        gradients.append(torch.cat([p.grad.flatten() for p in step.encoder.model.parameters() if p.grad is not None]))
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], atol=1e-5, rtol=1e-4)
    assert gradients[0].norm() > 0.1


def test_ratios_are_taken_within_a_round(speed):
    row = speed.speed_steps.compared("A", [1.0, 2.0, 4.0], [3.0, 4.0, 20.0], "CPU ms", "ViT", 32)
    assert (row["with"], row["without"], row["ratio"]) == (2000, 4000, 3)


def test_what_is_not_reached_is_a_bound(speed):
    row = speed.speed_repairs.row("A", 100, None, "steps", "ViT", 32, 0, unreached=4000)
    text = speed.table({"parts": {"steps": {"rows": [row]}}})
    assert "| A | 100 | > 4000 | > 40.00 | steps |" in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there, and the patch would run")
def test_a_patch_on_a_gpu_refuses_without_one(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(FOLDER))
    import speed_gpu

    monkeypatch.setattr("sys.argv", ["speed_gpu.py", "--data", "x", "--output", str(tmp_path / "gpu.json")])
    with pytest.raises(SystemExit) as stopped:
        speed_gpu.main()
    assert stopped.value.code == 2
    assert "a CUDA GPU is needed and PyTorch finds none" in capsys.readouterr().err
    assert not (tmp_path / "gpu.json").exists()


def test_pictures_must_be_named(speed, capsys):
    with pytest.raises(SystemExit):
        speed.main(["--only", "data"])
    assert "pass `--data uoft-cs/cifar10`" in capsys.readouterr().err
