# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""An adapter as a patch: how large it is, and what the command line makes."""

import argparse
import json

import pytest
from peft import LoraConfig
from transformers import ViTConfig, ViTModel
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from hf_mudjacking import BugInstance, MudjackingTrainer
from hf_mudjacking.cli import main, patch
from hf_mudjacking.triggers import square_patch

from .conftest import make_config, make_dataset, make_images


def default_rank() -> int:
    """What `mudjack patch --lora-rank` means without a number."""
    parser = argparse.ArgumentParser()
    patch.add_arguments(parser)
    return parser.parse_args(["--lora-rank"]).lora_rank


def test_the_patch_of_a_vit_base_is_under_five_megabytes(tmp_path):
    images = make_images(10, (224, 224))
    trainer = MudjackingTrainer(
        model=ViTModel(ViTConfig(), add_pooling_layer=False),
        args=make_config(tmp_path, max_steps=1),
        bug_instances=[BugInstance(images[0], images[1])],
        train_dataset=make_dataset(images[2:]),
        processing_class=ViTImageProcessorPil(),
        peft_config=LoraConfig(r=default_rank(), lora_alpha=default_rank()),
        triggers=[square_patch((224, 224), 70)],
    )
    adapted = [name for name, p in trainer.model.named_parameters() if p.requires_grad and "lora_A" in name]
    # Four projections and two linear layers in each of twelve blocks, and the embedding of patches
    assert len(adapted) == 12 * 6 + 1
    trainer.save_model()
    size = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    weights = (tmp_path / "adapter_model.safetensors").stat().st_size
    assert weights == pytest.approx(default_rank() * 4 * (12 * 13824 + 3 * 16 * 16 + 768), rel=0.01)
    assert size < 5e6


@pytest.mark.parametrize(("options", "learning_rate"), [(["--lora-rank"], 3e-3), ([], 3e-4)])
def test_an_adapter_learns_faster(options, learning_rate, backdoored, tmp_path):
    backdoored.model().save_pretrained(tmp_path / "model")
    backdoored.processor.save_pretrained(tmp_path / "model")
    backdoored.bug().save(tmp_path / "bug")
    backdoored.dataset(64).to_parquet(tmp_path / "clean.parquet")
    command = ["patch", "--model", str(tmp_path / "model"), "--bug", str(tmp_path / "bug"), "--output-dir"]
    command += [str(tmp_path / "out"), "--dataset", str(tmp_path / "clean.parquet"), "--max-steps", "2"]
    command += ["--reinversions", "0", "--locality-budget", "none", "--disable-tqdm"]
    assert main([*command, *options]) == 0
    assert json.loads((tmp_path / "out" / "mudjacking.json").read_text())["settings"]["learning_rate"] == learning_rate
    if options:
        assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == default_rank()
