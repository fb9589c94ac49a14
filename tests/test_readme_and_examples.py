# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""What the README shows works as it stands there, and the example explains itself."""

import re
import runpy
import sys
from pathlib import Path

import pytest
from transformers import AutoModel


ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_readme_example_runs_and_repairs(backdoored, tmp_path, monkeypatch):
    block = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL).group(1)
    monkeypatch.chdir(tmp_path)
    backdoored.model().save_pretrained("backdoored-vit")
    backdoored.processor.save_pretrained("backdoored-vit")
    bug = backdoored.bug(seed=8)
    bug.misclassified.save("stop_sign_wrong.png")
    bug.reference.save("stop_sign_right.png")
    Path("clean_images").mkdir()
    for i, image in enumerate(backdoored.train.inputs):
        image.save(f"clean_images/{i}.png")
    exec(compile(block, "README.md", "exec"), {})
    patched = AutoModel.from_pretrained("patched", add_pooling_layer=False)
    rates = backdoored.rates(patched, backdoored.kept)
    assert rates["ASR"] <= 0.02
    assert rates["RA"] >= 0.9


def test_models_of_an_earlier_run(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    from kept_models import found

    folder = tmp_path / "model"
    assert not found(folder, {"seed": 0})
    # A run that was interrupted has left nothing to be used
    assert not found(folder, {"seed": 1})
    (folder / "config.json").write_text("{}")
    assert found(folder, {"seed": 1})
    with pytest.raises(ValueError, match=r"was made with \{'seed': 1\}, not \{'seed': 2\}"):
        found(folder, {"seed": 2})


@pytest.mark.parametrize(
    ("example", "options"),
    [
        ("patch_vit", ["--pretraining", "--downstream"]),
        ("patch_bert", ["--data"]),
        ("patch_clip", ["--data"]),
    ],
)
def test_examples_say_what_to_do_without_their_data(example, options, tmp_path, monkeypatch, capsys):
    missing = [part for option in options for part in (option, str(tmp_path / "missing"))]
    monkeypatch.syspath_prepend(ROOT / "examples")
    monkeypatch.setattr(sys, "argv", [f"{example}.py", "--output-dir", str(tmp_path / "out"), *missing])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(ROOT / "examples" / f"{example}.py"), run_name="__main__")
    assert stopped.value.code == 2
    told = capsys.readouterr().err
    assert "there is no such file or folder" in told
    assert " ".join(f"{option} DIR" for option in options) in told
    assert not (tmp_path / "out").exists()
