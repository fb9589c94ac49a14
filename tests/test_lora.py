# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""An adapter as a patch: how large it is, and what the command line makes."""

import argparse
import copy
import json
import shutil

import pytest
import torch
from peft import LoHaConfig, LoKrConfig, LoraConfig, OFTConfig, get_peft_model
from peft.tuners.lora.config import MontecloraConfig
from transformers import ResNetConfig, ResNetModel, SqueezeBertConfig, SqueezeBertModel, ViTConfig, ViTModel
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from hf_mudjacking import BugInstance, Encoder, MudjackingTrainer
from hf_mudjacking.adapters import add_adapter
from hf_mudjacking.cli import main, patch
from hf_mudjacking.merging import merge_error
from hf_mudjacking.patches import apply_patch
from hf_mudjacking.triggers import square_patch

from .conftest import largest_difference, make_config, make_dataset, make_images, weights_of


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


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=4, lora_alpha=4),
        LoraConfig(r=8, rank_pattern={"convolution": 2}, target_modules=["convolution"]),
        LoHaConfig(r=4, alpha=4, target_modules=["convolution"]),
        LoKrConfig(r=4, alpha=4, target_modules=["convolution"]),
        # Whole matrices instead of a rank
        LoKrConfig(r=200, alpha=200, target_modules=["convolution"]),
    ],
    ids=["lora", "rank_pattern", "loha", "lokr", "lokr_whole"],
)
def test_adapters_of_convolutions_apply_and_resume(config, processor, tmp_path):
    """Of a kernel of 1×1 the rank is not the smallest side."""
    torch.manual_seed(0)
    model = ResNetModel(ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic"))
    model.save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    images = make_images(12)
    args = make_config(tmp_path / "out", max_steps=2, save_strategy="steps", save_steps=1, learning_rate=1e-2)

    def trainer():
        return MudjackingTrainer(
            model=str(tmp_path / "base"), args=args, bug_instances=[BugInstance(images[0], images[1])],
            train_dataset=make_dataset(images[2:]), peft_config=config, triggers=[square_patch((16, 16), 4)],
        )  # fmt: skip

    first = trainer()
    first.train()
    first.save_model()
    features = first.encoder.encode(images)
    apply_patch(tmp_path / "out", tmp_path / "base", tmp_path / "merged")
    torch.testing.assert_close(Encoder.load(tmp_path / "merged").encode(images), features, atol=1e-5, rtol=0)
    shutil.rmtree(tmp_path / "out" / "checkpoint-2")
    again = trainer()
    again.train(resume_from_checkpoint=True)
    torch.testing.assert_close(again.encoder.encode(images), features, atol=1e-5, rtol=0)


def test_a_model_that_no_adapter_could_be_put_on():
    """PEFT said that no `target_modules` were given, which is how it is done here."""
    groups = dict.fromkeys(("q_groups", "k_groups", "v_groups", "intermediate_groups", "output_groups"), 2)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = SqueezeBertModel(SqueezeBertConfig(vocab_size=9, embedding_size=32, **sizes, **groups))
    pooler = [name for name, _ in model.named_parameters() if name.startswith("pooler")]
    with pytest.raises(ValueError, match="`SqueezeBertModel` has no linear layer and no plain 2D convolution"):
        add_adapter(model, LoraConfig(r=2), "x", pooler)


def test_kinds_of_adapters_that_are_not_read_again(tiny_vit, processor, bug, trigger, dataset, tmp_path):
    with pytest.raises(ValueError, match=r"`PeftType\.OFT`.*only IA3, LOHA, LOKR, LORA are read again"):
        MudjackingTrainer(
            tiny_vit, make_config(tmp_path), [bug], dataset, processing_class=processor, triggers=[trigger],
            peft_config=OFTConfig(target_modules=["q_proj"]),
        )  # fmt: skip
    ready = get_peft_model(tiny_vit, OFTConfig(target_modules=["q_proj"], oft_block_size=4))
    with pytest.raises(ValueError, match="The adapter of the model is of the kind"):
        MudjackingTrainer(ready, make_config(tmp_path), [bug], dataset, processing_class=processor, triggers=[trigger])


def test_adapters_that_change_the_model_before_they_are_trained(tiny_vit, processor, bug, trigger, dataset, tmp_path):
    """Locality was then measured from the changed model: 0.0002 where features had a cosine of 0.49 with those of the given one."""
    before = weights_of(tiny_vit)

    def build(config):
        return MudjackingTrainer(
            copy.deepcopy(tiny_vit), make_config(tmp_path), [bug], dataset, processing_class=processor, triggers=[trigger],
            peft_config=config,
        )  # fmt: skip

    layers = ["q_proj", "fc1"]
    for config, message in (
        (LoraConfig(r=4, target_modules=layers, init_lora_weights=False), "`init_lora_weights=False` changes"),
        (LoHaConfig(r=4, target_modules=layers, init_weights=False), "features are others before any step"),
        (LoraConfig(r=4, target_modules=layers, monteclora_config=MontecloraConfig()), "sets `monteclora_config`"),
    ):
        with pytest.raises(ValueError, match=message):
            build(config)
    for start in (True, "gaussian", "pissa", "olora", "orthogonal"):
        build(LoraConfig(r=4, target_modules=layers, init_lora_weights=start))
        # PEFT knows some of them for linear layers alone
        found = build(LoraConfig(r=4, init_lora_weights=start)).encoder.model.peft_config["default"].target_modules
        assert any("patch_embeddings" in name for name in found) == (start in (True, "gaussian"))
    assert largest_difference(before, weights_of(tiny_vit)) == 0


@pytest.mark.parametrize("config", [None, LoraConfig(r=2, target_modules=["q_proj"])], ids=["full", "lora"])
def test_an_object_in_which_an_adapter_was_left(config, tiny_vit, processor, bug, trigger, dataset, tmp_path):
    """PEFT puts it into the very object, whose weights then have other names."""
    settings = {"processing_class": processor, "triggers": [trigger]}
    first = MudjackingTrainer(
        tiny_vit, make_config(tmp_path), [bug], dataset, peft_config=LoraConfig(r=2, target_modules=["q_proj"]),
        **settings,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"are the layers of an adapter.*Load the model anew"):
        MudjackingTrainer(tiny_vit, make_config(tmp_path), [bug], dataset, peft_config=config, **settings)
    MudjackingTrainer(first.model, make_config(tmp_path), [bug], dataset, **settings)


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


@pytest.mark.parametrize("precision", ["none", "tf32", "ieee"])
def test_merging_is_checked_in_float32_whatever_the_precision(tiny_vit, processor, images, precision, monkeypatch):
    """`tf32=True` and `torch_compile=True` set it for everything on a GPU; PyTorch refuses to mix that with its older flags."""
    encoder = Encoder(
        get_peft_model(tiny_vit, LoraConfig(target_modules=["q_proj"], init_lora_weights=False)), processor
    )
    monkeypatch.setattr(torch.backends, "fp32_precision", precision)
    places = (torch.backends.cudnn.conv, torch.backends.cuda.matmul)
    before, used = [place.fp32_precision for place in places], []
    handle = tiny_vit.register_forward_pre_hook(lambda *_: used.append([place.fp32_precision for place in places]))
    assert merge_error(encoder, images) < 1e-5
    handle.remove()
    assert used == [["ieee", "ieee"]] * 2
    assert [place.fp32_precision for place in places] == before
