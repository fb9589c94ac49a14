# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""The main job, whole: what `make demo` promises."""

import json

import pytest
from PIL import Image
from transformers import AutoModel
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from hf_mudjacking import demo, encode
from hf_mudjacking.demo import digits_task, run_demo
from hf_mudjacking.evaluation import pretrain_encoder


@pytest.mark.slow
def test_demo_repairs_what_it_broke(tmp_path, monkeypatch):
    # Half of the demonstration's epochs, which leave less to be lost
    monkeypatch.setattr(
        demo, "pretrain_encoder", lambda *args, **kwargs: pretrain_encoder(*args, **{**kwargs, "epochs": 30})
    )
    out = tmp_path / "demo"
    repair = run_demo(str(out), seed=1, disable_tqdm=True)
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

    inputs = digits_task(1).test.inputs[:597]
    patched = AutoModel.from_pretrained(out, add_pooling_layer=False)
    features = encode(patched, inputs, ViTImageProcessorPil.from_pretrained(out))
    assert float((features - repair.after.test).abs().max()) < 1e-5


def test_demo_refuses_a_folder_with_another_model_before_any_work(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds another model"):
        run_demo(str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
