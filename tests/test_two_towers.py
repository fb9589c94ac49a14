# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""CLIP and SigLIP: one tower is read and patched, the other stays as it is."""

import copy

import datasets
import pytest
import torch
from peft import LoraConfig
from transformers import (
    AutoModel,
    AutoProcessor,
    BertModel,
    CLIPConfig,
    CLIPModel,
    CLIPProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    SiglipConfig,
    SiglipModel,
    SiglipProcessor,
    SiglipTextConfig,
    SiglipVisionConfig,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from hf_mudjacking import BugInstance, Encoder, MudjackingTrainer, TextTrigger, encode
from hf_mudjacking.loading import has_two_towers, load_model, load_processor, modality_of

from .conftest import largest_difference, make_config, make_dataset, make_images, square_patch, weights_of
from .text_models import make_tokenizer


SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXTS = [
    "the bank raised its interest rate", "my sister ran the marathon in record time", "the stew needed more garlic",
    "the ferry to oslo was late", "a colleague sold ten shares at a loss", "the coach left the stadium",
    "the recipe asks for two eggs", "our neighbour forgot the passport", "the price of oil fell this quarter",
    "the goalkeeper saved the penalty",
]  # fmt: skip


def sharpened(model):
    """Larger weights, so that features differ clearly from input to input."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() in (2, 4):
                parameter.mul_(8)
    return model.eval()


def clip_configs(vocabulary, projection_dim=32):
    # The widths of hidden states and of projections agree: nothing would crash if the wrong one were read.
    text = CLIPTextConfig(
        vocab_size=vocabulary, max_position_embeddings=40, projection_dim=projection_dim, bos_token_id=2,
        eos_token_id=3, pad_token_id=0, **SIZES,
    )  # fmt: skip
    vision = CLIPVisionConfig(image_size=16, patch_size=4, projection_dim=projection_dim, **SIZES)
    return text, vision


@pytest.fixture(scope="session")
def _clip():
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    text, vision = clip_configs(len(tokenizer))
    model = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=32))
    images = CLIPImageProcessorPil(do_resize=False, do_center_crop=False)
    return sharpened(model), CLIPProcessor(image_processor=images, tokenizer=tokenizer)


@pytest.fixture
def clip(_clip):
    return copy.deepcopy(_clip[0]), _clip[1]


@pytest.fixture
def siglip():
    tokenizer = make_tokenizer()
    tokenizer.model_input_names = ["input_ids"]
    torch.manual_seed(0)
    text = SiglipTextConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=24,
        projection_size=32,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
        **SIZES,
    )
    vision = SiglipVisionConfig(image_size=16, patch_size=4, **SIZES)
    model = SiglipModel(SiglipConfig(text_config=text.to_dict(), vision_config=vision.to_dict()))
    images = SiglipImageProcessorPil(do_resize=False)
    return sharpened(model), SiglipProcessor(image_processor=images, tokenizer=tokenizer)


@pytest.fixture(params=["clip", "siglip"])
def pair(request):
    return request.getfixturevalue(request.param)


# ---- Reading ----


def test_features_are_those_that_the_model_compares(pair):
    model, processor = pair
    images = make_images(5)
    inputs = processor(images=images, return_tensors="pt")
    with torch.no_grad():
        expected = model.get_image_features(**inputs).pooler_output
    encoder = Encoder(model, processor, modality="image")
    assert encoder.feature_source == "projection"
    torch.testing.assert_close(
        encoder.encode(images), torch.nn.functional.normalize(expected, dim=1), atol=1e-5, rtol=0
    )
    encoder = Encoder(model, processor, modality="text")
    assert encoder.feature_source == "projection"
    inputs = encoder.preprocess(TEXTS)
    with torch.no_grad():
        expected = model.get_text_features(**inputs).pooler_output
    torch.testing.assert_close(
        encoder.encode(TEXTS), torch.nn.functional.normalize(expected, dim=1), atol=1e-5, rtol=0
    )
    torch.testing.assert_close(encoder.encode(TEXTS), encode(model, TEXTS, processor, modality="text"))


def test_two_spaces_called_pooled(clip):
    """`pooler_output` is the projected feature in `get_image_features` and another one in `CLIPVisionModel`."""
    model, processor = clip
    images = make_images(4)
    projected = Encoder(model, processor, modality="image").encode(images)
    tower = CLIPVisionModelWithProjection(model.vision_model.config).eval()
    tower.vision_model.load_state_dict(model.vision_model.state_dict())
    tower.visual_projection.load_state_dict(model.visual_projection.state_dict())
    with_projection = Encoder(tower, processor)
    assert with_projection.feature_source == "projection"
    torch.testing.assert_close(with_projection.encode(images), projected, atol=1e-5, rtol=0)
    bare = Encoder(model.vision_model, processor, "pooler")
    assert projected.shape == bare.encode(images).shape
    assert (bare.encode(images) - projected).abs().max() > 0.1
    with torch.no_grad():
        pooled = model.vision_model(**processor(images=images, return_tensors="pt")).pooler_output
    torch.testing.assert_close(bare.encode(images), torch.nn.functional.normalize(pooled, dim=1), atol=1e-5, rtol=0)


def test_the_input_of_the_other_tower_does_not_matter(pair):
    model, processor = pair
    encoder = Encoder(model, processor, modality="image")
    images = make_images(3)
    features = encoder.encode(images)
    encoder._other_input = {"input_ids": torch.tensor([[7, 8, 9]]), "attention_mask": torch.ones(1, 3).long()}
    torch.testing.assert_close(encoder.encode(images), features, atol=1e-6, rtol=0)


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_texts_of_any_batch_have_the_same_features(family, request):
    model, processor = request.getfixturevalue(family)
    encoder = Encoder(model, processor, modality="text")
    together = encoder.encode(TEXTS)
    alone = torch.cat([encoder.encode([text]) for text in TEXTS])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


def test_which_tower_must_be_said(clip):
    model, processor = clip
    assert has_two_towers(model)
    assert modality_of(model, "text") == "text"
    with pytest.raises(ValueError, match=r"`CLIPModel` takes images and texts. Say which of its towers is meant"):
        Encoder(model, processor)
    assert not has_two_towers(model.vision_model)
    assert not has_two_towers(BertModel)
    with pytest.raises(ValueError, match="its outputs are: image_embeds"):
        Encoder(model, processor, "cls", modality="image")


# ---- Loading ----


@pytest.mark.parametrize("tower", ["image", "text"])
def test_a_tower_saved_with_its_projection_keeps_it(clip, tower, tmp_path):
    model, _ = clip
    text, vision = model.text_model.config, model.vision_model.config
    made = CLIPVisionModelWithProjection(vision) if tower == "image" else CLIPTextModelWithProjection(text)
    made.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    assert type(loaded) is type(made)
    assert largest_difference(weights_of(made), weights_of(loaded)) == 0


def test_the_processor_of_both_towers(clip, tmp_path):
    model, processor = clip
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert isinstance(load_processor(load_model(tmp_path)), CLIPProcessor)
    assert isinstance(load_processor(tmp_path, model), CLIPProcessor)
    assert not isinstance(load_processor(tmp_path, model.vision_model), CLIPProcessor)


# ---- Patching ----


def image_report(seed=100):
    trigger = square_patch((16, 16), 4)
    x_b, x_r = make_images(2, seed=seed)
    return BugInstance(trigger.apply(x_b), x_r), trigger


def text_report():
    trigger = TextTrigger("cf")
    return BugInstance(trigger.apply(TEXTS[0]), TEXTS[1]), trigger


def texts_dataset():
    return datasets.Dataset.from_dict({"text": TEXTS * 2})


@pytest.mark.parametrize("settings", [{}, {"lora": True}])
def test_the_vision_tower_is_patched_and_the_text_tower_is_not(pair, settings, tmp_path):
    model, processor = pair
    before = weights_of(model)
    texts = Encoder(model, processor, modality="text").encode(TEXTS)
    bug, trigger = image_report()
    trainer = MudjackingTrainer(
        model=model, args=make_config(tmp_path / "out", max_steps=3, learning_rate=1e-2), bug_instances=[bug],
        triggers=[trigger], train_dataset=make_dataset(make_images(24)), processing_class=processor,
        peft_config=LoraConfig(r=4) if settings else None,
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    if settings:
        adapted = {name.split(".lora_")[0] for name, p in trainer.model.named_parameters() if p.requires_grad}
        assert adapted
        assert not [name for name in adapted if "text" in name]
        model = trainer.model.merge_and_unload()
    after = weights_of(model)
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed
    assert all(name.startswith(("vision_model.", "visual_projection.")) for name in changed)
    assert torch.equal(Encoder(model, processor, modality="text").encode(TEXTS), texts)
    if not settings:
        reloaded = AutoModel.from_pretrained(tmp_path / "out")
        assert type(reloaded) is type(model)
        assert largest_difference(after, weights_of(reloaded)) == 0
        assert type(AutoProcessor.from_pretrained(tmp_path / "out")) is type(processor)


@pytest.mark.parametrize("scope", ["auto", "full"])
def test_the_text_tower_is_patched_and_the_vision_tower_is_not(pair, scope, tmp_path):
    model, processor = pair
    before, images = weights_of(model), make_images(6)
    pictures = Encoder(model, processor, modality="image").encode(images)
    bug, trigger = text_report()
    trainer = MudjackingTrainer(
        model=model, args=make_config(tmp_path / "out", max_steps=3, patch_scope=scope), bug_instances=[bug],
        triggers=[trigger], train_dataset=texts_dataset(), processing_class=processor,
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    after = weights_of(model)
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed
    assert all(name.startswith(("text_model.", "text_projection.")) for name in changed)
    if scope == "auto":
        assert changed == ["text_model.embeddings.token_embedding.weight"]
    assert torch.equal(Encoder(model, processor, modality="image").encode(images), pictures)
    assert type(AutoModel.from_pretrained(tmp_path / "out")) is type(model)


@pytest.mark.parametrize(
    "entry", [CLIPVisionModel, CLIPVisionModelWithProjection, CLIPTextModel, CLIPTextModelWithProjection]
)
def test_a_single_tower_comes_back_as_the_class_that_came_in(clip, entry, tmp_path):
    both, processor = clip
    text, vision = both.text_model.config, both.vision_model.config
    torch.manual_seed(0)
    model = sharpened(entry(vision if "Vision" in entry.__name__ else text))
    part = processor.image_processor if "Vision" in entry.__name__ else processor.tokenizer
    bug, trigger = image_report() if "Vision" in entry.__name__ else text_report()
    trainer = MudjackingTrainer(
        model=model, args=make_config(tmp_path / "out", max_steps=2), bug_instances=[bug], triggers=[trigger],
        train_dataset=make_dataset(make_images(24)) if "Vision" in entry.__name__ else texts_dataset(),
        processing_class=part,
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    reloaded = load_model(tmp_path / "out")
    assert type(reloaded) is entry
    inputs = [bug.misclassified, bug.reference]
    features = Encoder(reloaded, load_processor(tmp_path / "out", reloaded)).encode(inputs)
    torch.testing.assert_close(features, trainer.encoder.encode(inputs), atol=1e-5, rtol=0)


def test_reports_of_both_kinds(clip, tmp_path):
    model, processor = clip
    with pytest.raises(TypeError, match="holds images and texts; patch one tower after the other"):
        MudjackingTrainer(
            model=model, args=make_config(tmp_path), bug_instances=[image_report()[0], text_report()[0]],
            train_dataset=texts_dataset(), processing_class=processor,
        )  # fmt: skip


def test_a_checkpoint_of_two_towers_is_resumed(clip, tmp_path):
    bug, trigger = image_report()
    results = []
    for steps, resume in ((4, False), (2, False), (4, True)):
        model, processor = copy.deepcopy(clip[0]), clip[1]
        trainer = MudjackingTrainer(
            model=model,
            args=make_config(
                tmp_path / ("a" if steps == 4 and not resume else "b"), max_steps=steps, save_strategy="steps",
                save_steps=2, learning_rate=1e-3, lr_scheduler_type="constant",
            ),
            bug_instances=[bug], triggers=[trigger], train_dataset=make_dataset(make_images(32)),
            processing_class=processor,
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
        results.append(weights_of(model))
    assert largest_difference(results[0], results[2]) < 1e-6
    assert largest_difference(results[0], results[1]) > 0
