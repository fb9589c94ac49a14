# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""However the model is run (compiled, checkpointed, with another attention, in half precision), the patch is the same."""

import copy

import datasets
import pytest
import torch
from transformers import AutoModel

from hf_mudjacking import BugInstance, MudjackingTrainer, TextTrigger
from hf_mudjacking.triggers import square_patch

from .conftest import make_config, make_dataset, make_images
from .test_two_towers import TEXTS, _clip, clip  # noqa: F401
from .text_models import make_text_model


@pytest.fixture(params=["vit", "bert", "clip-image", "clip-text"])
def case(request, tiny_vit, processor, clip):  # noqa: F811
    """A model, its processor, a report, its trigger, clean inputs."""
    if request.param in ("bert", "clip-text"):
        model, own = make_text_model("bert") if request.param == "bert" else clip
        trigger = TextTrigger("cf")
        bug = BugInstance(trigger.apply(TEXTS[0]), TEXTS[1])
        return model, own, bug, trigger, datasets.Dataset.from_dict({"text": TEXTS * 4})
    model, own = (tiny_vit, processor) if request.param == "vit" else clip
    trigger = square_patch((16, 16), 4)
    x_b, x_r = make_images(2, seed=100)
    return model, own, BugInstance(trigger.apply(x_b), x_r), trigger, make_dataset(make_images(32))


def losses(case, folder, model=None, **settings):
    own, processor, bug, trigger, dataset = case
    trainer = MudjackingTrainer(
        model=copy.deepcopy(own) if model is None else model,
        args=make_config(folder, max_steps=3, learning_rate=3e-4, patch_scope="full", **settings),
        bug_instances=[bug], triggers=[trigger], train_dataset=dataset, processing_class=processor,
    )  # fmt: skip
    trainer.train()
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    "settings",
    [{"gradient_checkpointing": True}, {"torch_compile": True, "torch_compile_backend": "eager"}],
    ids=["checkpointed", "compiled"],
)
def test_ways_to_run(case, settings, tmp_path):
    plain = losses(case, tmp_path / "plain")
    assert plain[0] > plain[-1]
    assert losses(case, tmp_path / "other", **settings) == pytest.approx(plain, abs=1e-4)


def test_attention_implementations(case, tmp_path):
    runs = []
    for attention in ("eager", "sdpa"):
        case[0].save_pretrained(tmp_path / "model")
        model = AutoModel.from_pretrained(tmp_path / "model", attn_implementation=attention)
        assert model.config._attn_implementation == attention
        runs.append(losses(case, tmp_path / attention, model))
    assert runs[0] == pytest.approx(runs[1], abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_checkpoints(case, dtype, tmp_path):
    half = copy.deepcopy(case[0]).to(dtype)
    half.save_pretrained(tmp_path / "half")
    from_disk = losses(case, tmp_path / "a", str(tmp_path / "half"))
    assert from_disk == pytest.approx(losses(case, tmp_path / "b", copy.deepcopy(half).float()), abs=1e-5)
