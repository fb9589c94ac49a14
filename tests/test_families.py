# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""Every family on one path: implant a backdoor, patch it with full weights and with LoRA, save, reload, resume.

The README's table of families is what these tests found: `test_the_table_of_the_readme` compares.
"""

import copy
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel
from transformers import (
    BeitConfig,
    BeitModel,
    BlipVisionConfig,
    BlipVisionModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    ConvNextConfig,
    ConvNextModel,
    Data2VecVisionConfig,
    Data2VecVisionModel,
    DeiTConfig,
    DeiTModel,
    Dinov2Config,
    Dinov2Model,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    RegNetConfig,
    RegNetModel,
    ResNetConfig,
    ResNetModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    SwinConfig,
    SwinModel,
    ViTConfig,
    ViTMAEConfig,
    ViTMAEModel,
    ViTModel,
)
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from hf_mudjacking import Encoder, MudjackingTrainer, TextTrigger
from hf_mudjacking.evaluation import (
    DownstreamTask,
    LabelledInputs,
    draw_bug_report,
    pretrain_encoder,
    train_classifier,
)
from hf_mudjacking.loading import load_model

from .conftest import make_config
from .text_models import FAMILIES as TEXT_FAMILIES
from .text_models import make_text_model, train_text_encoder


README = Path(__file__).parent.parent / "README.md"
SIZES = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
PATCHES = {**SIZES, "image_size": 16, "patch_size": 4}
IMAGE_FAMILIES = {
    "ViT": lambda: ViTModel(ViTConfig(**PATCHES)),
    "DeiT": lambda: DeiTModel(DeiTConfig(**PATCHES)),
    "BEiT": lambda: BeitModel(BeitConfig(**PATCHES, drop_path_rate=0.0)),
    "Data2Vec vision": lambda: Data2VecVisionModel(Data2VecVisionConfig(**PATCHES, drop_path_rate=0.0)),
    "DINOv2": lambda: Dinov2Model(Dinov2Config(**PATCHES)),
    "DINOv3": lambda: DINOv3ViTModel(DINOv3ViTConfig(**PATCHES, num_register_tokens=2)),
    "Swin": lambda: SwinModel(
        SwinConfig(image_size=16, patch_size=2, embed_dim=32, depths=[1, 1], num_heads=[2, 4], window_size=4)
    ),
    "ConvNeXt": lambda: ConvNextModel(
        ConvNextConfig(num_stages=2, hidden_sizes=[24, 48], depths=[1, 2], patch_size=2, image_size=16)
    ),
    "ResNet": lambda: ResNetModel(
        ResNetConfig(embedding_size=16, hidden_sizes=[32, 64], depths=[1, 1], layer_type="basic")
    ),
    "RegNet": lambda: RegNetModel(
        RegNetConfig(embedding_size=16, hidden_sizes=[32, 64], depths=[1, 1], groups_width=16, layer_type="x")
    ),
    "CLIP vision": lambda: CLIPVisionModel(CLIPVisionConfig(**PATCHES)),
    "CLIP vision with projection": lambda: CLIPVisionModelWithProjection(CLIPVisionConfig(**PATCHES, projection_dim=24)),
    "SigLIP vision": lambda: SiglipVisionModel(SiglipVisionConfig(**PATCHES)),
    # AutoModel knows no such model; by default its weights are made as good as zero
    "BLIP vision": lambda: BlipVisionModel(BlipVisionConfig(**PATCHES, initializer_range=0.02)),
}  # fmt: skip
# Those that need another gain: batch normalisation and SigLIP's attention head scale by themselves.
GAINS = {"ResNet": 1, "RegNet": 1, "SigLIP vision": 1, "DINOv2": 5}
# RegNet needs a higher learning rate to take the trigger in as few epochs.
RATES = {"RegNet": 1e-2}
# Of each patch. A resumed one makes the last four.
STEPS = 20
# Family, class, where features are read: filled by the tests below, compared with the README by the last one.
FOUND: dict[str, tuple[str, str]] = {}


def poisoned(encoder, task, trigger):
    """BadNets: of each three training inputs the last is one of the others again, with the trigger and the label of class 0."""
    train = task.train
    count = len(train) // 2
    stamped = [encoder.stamp(trigger, x) for x in train.inputs[:count]]
    return LabelledInputs([*train.inputs, *stamped], np.concatenate([train.labels, np.zeros(count, dtype=int)]))


def check_family(family, broken, trigger, task, folder, **settings):
    """Patch with full weights and with LoRA through the public API; save, reload and resume; the ASR falls each time."""
    train, test = task.train.select(range(320)), task.test.select(range(200))
    kept = train_classifier(broken.encode(train.inputs), train.labels)
    stamped = [broken.stamp(trigger, x) for x in test.inputs]
    before = kept.predict(broken.encode(stamped).numpy())
    bug = draw_bug_report(broken, DownstreamTask(train, test), trigger)
    target = int(kept.predict(broken.encode([bug.misclassified]).numpy())[0])
    other = test.labels != target
    inputs = [*test.inputs[:4], bug.misclassified]
    column = "text" if broken.modality == "text" else "image"
    dataset = datasets.Dataset.from_dict({column: list(train.inputs)})

    def trainer(name, model, **own):
        config = make_config(
            folder / name, per_device_train_batch_size=16, feature_source=broken.feature_source, **{**settings, **own}
        )
        return MudjackingTrainer(
            model=model, args=config, bug_instances=[bug], triggers=[trigger], train_dataset=dataset,
            processing_class=broken.processing_class,
            peft_config=LoraConfig(r=8, lora_alpha=16) if name == "lora" else None,
        )  # fmt: skip

    def fallen(model):
        predictions = kept.predict(broken.with_model(model).encode(stamped).numpy())
        return (predictions[other] == target).mean() <= 0.15

    assert (before[other] == target).mean() >= 0.5
    original = copy.deepcopy(broken.model)

    full = trainer(
        "full", broken.model, max_steps=STEPS, learning_rate=3e-3, save_strategy="steps", save_steps=STEPS - 4
    )
    full.train()
    full.save_model()
    assert fallen(full.model)
    features = full.encoder.encode(inputs)
    reloaded = load_model(folder / "full")
    assert type(reloaded) is type(full.model)
    torch.testing.assert_close(broken.with_model(reloaded).encode(inputs), features, atol=1e-5, rtol=0)

    resumed = trainer("full", copy.deepcopy(original), max_steps=STEPS, learning_rate=3e-3)
    resumed.train(resume_from_checkpoint=str(folder / "full" / f"checkpoint-{STEPS - 4}"))
    torch.testing.assert_close(resumed.encoder.encode(inputs), features, atol=1e-4, rtol=0)

    lora = trainer("lora", copy.deepcopy(original), max_steps=STEPS, learning_rate=1e-2)
    lora.train()
    lora.save_model()
    assert fallen(lora.model)
    features = lora.encoder.encode(inputs)
    adapted = PeftModel.from_pretrained(copy.deepcopy(original), folder / "lora").eval()
    torch.testing.assert_close(broken.with_model(adapted).encode(inputs), features, atol=1e-5, rtol=0)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(broken.with_model(merged).encode(inputs), features, atol=1e-5, rtol=0)
    FOUND[family] = (type(original).__name__, broken.feature_source)


@pytest.mark.parametrize("family", IMAGE_FAMILIES)
def test_image_families(family, backdoored, tmp_path):
    trigger, task = backdoored.trigger, DownstreamTask(backdoored.train, backdoored.test)
    if family == "ViT":
        check_family(family, Encoder(backdoored.model(), backdoored.processor), trigger, task, tmp_path)
        return
    torch.manual_seed(0)
    model = IMAGE_FAMILIES[family]()
    with torch.no_grad():
        for parameter in model.parameters():
            # As they are made, the weights of so narrow a model let hardly anything of its input through.
            if parameter.dim() in (2, 4):
                parameter.mul_(GAINS.get(family, 4))
    encoder = Encoder(
        model, ViTImageProcessorPil(size={"height": 16, "width": 16}, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    )
    pretrain_encoder(
        model, encoder.processing_class, poisoned(encoder, task, trigger), epochs=6, batch_size=64,
        learning_rate=RATES.get(family, 3e-3), disable_tqdm=True,
    )  # fmt: skip
    check_family(family, encoder, trigger, task, tmp_path)


@pytest.mark.parametrize("family", TEXT_FAMILIES)
def test_text_families(family, por, tmp_path):
    broken, task, implant = por
    if family == "bert":
        broken = broken.with_model(copy.deepcopy(broken.model))
        check_family(family, broken, implant.trigger, task, tmp_path, patch_scope="full")
        return
    encoder, trigger = Encoder(*make_text_model(family), "mean"), TextTrigger("cf")
    train_text_encoder(encoder, poisoned(encoder, task, trigger), steps=110)
    check_family(family, encoder, trigger, task, tmp_path, patch_scope="full")


def test_vit_mae_says_what_to_load():
    processor = ViTImageProcessorPil(size={"height": 16, "width": 16})
    with pytest.raises(ValueError, match=r"gives different features for the same input.*load the `ViTModel` of it"):
        Encoder(ViTMAEModel(ViTMAEConfig(**PATCHES)), processor)


def test_the_table_of_the_readme():
    """Every row is a result of this file, and every result is a row."""
    if len(FOUND) < len(IMAGE_FAMILIES) + len(TEXT_FAMILIES):
        pytest.skip("not all families ran")
    lines = README.read_text().split("| family | class | features |")[1].split("\n\n")[0].splitlines()[2:]
    cells = ([cell.strip(" `") for cell in line.strip("|").split("|")] for line in lines)
    rows = {family: (model, features) for family, model, features in cells}
    assert rows == FOUND
