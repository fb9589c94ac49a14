# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""What `make demo` promises. Its encoder and its implant are those of the fixture, which the same functions made in fewer steps."""

import copy
import dataclasses
import json

import numpy as np
import pytest
from accelerate import PartialState
from PIL import Image
from transformers import AutoModel
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from hf_mudjacking import Encoder, demo, encode
from hf_mudjacking.demo import digits_task, run_demo


@pytest.mark.slow
def test_demo_repairs_what_it_broke(backdoored, tmp_path, monkeypatch):
    clean = Encoder(copy.deepcopy(backdoored.clean_model), backdoored.processor)
    implant = dataclasses.replace(backdoored.implant, model=backdoored.model())

    def clean_vit(task, seed, disable_tqdm):
        assert [np.asarray(x).tobytes() for x in task.train.inputs] == pictures
        assert (seed, disable_tqdm) == (0, True)
        return clean

    def backdoored_vit(encoder, task, seed, disable_tqdm):
        assert encoder is clean
        assert (seed, disable_tqdm) == (0, True)
        return implant

    pictures = [np.asarray(x).tobytes() for x in backdoored.train.inputs]
    monkeypatch.setattr(demo, "clean_vit", clean_vit)
    monkeypatch.setattr(demo, "backdoored_vit", backdoored_vit)
    out = tmp_path / "demo"
    repair = run_demo(str(out), disable_tqdm=True)
    report = json.loads((out / "report.json").read_text())
    assert report == json.loads(json.dumps(repair.report))
    for block in (report, report["other_classifiers"]["mlp"]):
        before, floor = block["before"]["kept"], block["clean"]["ASR-B"]
        assert before["BA"] >= 0.96
        assert before["ASR"] >= 0.98
        assert before["bug_fixed"] is False
        for protocol in ("kept", "retrained"):
            after = block["after"][protocol]
            assert after["ASR"] <= floor + 0.02
            assert after["RA"] >= 0.96
            assert abs(after["BA"] - before["BA"]) <= 0.01
            assert after["bug_fixed"] is True
    assert report["triggers"][0]["recall"] >= 0.9
    assert report["cost"]["forward_equivalents"] > report["cost"]["inversion_forwards"] > 300
    assert Image.open(out / "repair.png").size == (1560, 1080)

    inputs = digits_task().test.inputs[:597]
    patched = AutoModel.from_pretrained(out, add_pooling_layer=False).to(PartialState().device)
    features = encode(patched, inputs, ViTImageProcessorPil.from_pretrained(out))
    assert float((features - repair.after.test).abs().max()) < 1e-5


def test_demo_refuses_a_folder_with_another_model_before_any_work(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds another model"):
        run_demo(str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
