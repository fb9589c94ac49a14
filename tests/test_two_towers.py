# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""CLIP and SigLIP: one tower is read and patched, the other stays as it is."""

import copy
import json

import datasets
import numpy as np
import pytest
import torch
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
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
    OwlViTConfig,
    OwlViTModel,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipModel,
    SiglipProcessor,
    SiglipTextConfig,
    SiglipVisionConfig,
    ViltConfig,
    ViltModel,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from hf_mudjacking import BugInstance, Encoder, MudjackingTrainer, TextTrigger, encode
from hf_mudjacking.attacks import implant_bad_encoder, implant_pair_poisoning
from hf_mudjacking.cli import main
from hf_mudjacking.evaluation import (
    DownstreamTask,
    LabelledInputs,
    TaskFeatures,
    ZeroShotClassifier,
    draw_bug_report,
    pretrain_two_towers,
    retrieval_rates,
    retrieval_recall,
)
from hf_mudjacking.latent import LatentStamps
from hf_mudjacking.loading import has_two_towers, load_model, load_processor, modality_of
from hf_mudjacking.output import TRIGGER_FOLDER
from hf_mudjacking.triggers import load_trigger

from .conftest import largest_difference, make_config, make_dataset, make_images, square_patch, weights_of
from .text_models import make_text_model, make_tokenizer


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
    # A processor writes its name into its tokenizer, which other tests share.
    tokenizer = copy.deepcopy(make_tokenizer())
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
    tokenizer = copy.deepcopy(make_tokenizer())
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


def test_the_tower_that_is_meant_is_stamped_inside(pair):
    model, processor = pair
    encoder = Encoder(model, processor, modality="image")
    images = make_images(4)
    stamps = LatentStamps(encoder, [BugInstance(*images[:2])], 0.6, lambda forwards: None)
    (name,) = (name for name, module in model.named_modules() if module is stamps.layer)
    assert name.startswith("vision_model.")
    pixels = encoder.preprocess(images)["pixel_values"]
    plain = encoder.features({"pixel_values": pixels}).detach()
    with stamps.carried(pixels[2:], torch.tensor([0, 1]), first=2):
        changed = encoder.features({"pixel_values": pixels}).detach()
    assert torch.equal(plain[:2], changed[:2])
    assert (plain[2:] != changed[2:]).any(dim=1).all()


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


@pytest.mark.parametrize("masked", [True, False])
def test_texts_of_any_batch_have_the_same_features(pair, masked):
    """SigLIP reads its padding, whether or not its tokenizer gives a mask."""
    model, processor = pair
    tokenizer = copy.deepcopy(processor.tokenizer)
    tokenizer.model_input_names = ["input_ids", "attention_mask"] if masked else ["input_ids"]
    encoder = Encoder(model, tokenizer, modality="text")
    if isinstance(model, SiglipModel):
        inputs = tokenizer(TEXTS, padding="max_length", max_length=24, return_tensors="pt")
        with torch.no_grad():
            expected = model.get_text_features(input_ids=inputs["input_ids"]).pooler_output
        expected = torch.nn.functional.normalize(expected, dim=1)
        torch.testing.assert_close(encoder.encode(TEXTS), expected, atol=1e-5, rtol=0)
    together = encoder.encode(TEXTS)
    alone = torch.cat([encoder.encode([text]) for text in TEXTS])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


def test_a_processor_of_another_model(clip):
    model, processor = clip
    large = CLIPImageProcessorPil(size={"height": 24, "width": 24}, do_center_crop=False)
    with pytest.raises(ValueError, match=r"`CLIPModel` refused inputs of shape \(1, 3, 24, 24\)"):
        Encoder(model, large, modality="image")
    with pytest.raises(ValueError, match=r"did not turn an image into `pixel_values`.*Pass the image processor"):
        Encoder(model, processor.tokenizer, modality="image")
    with pytest.raises(ValueError, match="takes texts and `CLIPImageProcessorPil` is no tokenizer"):
        Encoder(model, large, modality="text")
    with pytest.raises(ValueError, match="`CLIPVisionModel` takes images, and texts were given"):
        Encoder(model.vision_model, large, modality="text")


def test_a_model_that_mixes_images_and_texts_is_no_pair_of_towers(clip):
    config = ViltConfig(vocab_size=500, image_size=16, patch_size=4, max_position_embeddings=40, **SIZES)
    with pytest.raises(
        ValueError, match=r"there is no `image_embeds` among its outputs, which are: last_hidden_state"
    ):
        Encoder(ViltModel(config), clip[1], modality="image")


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
    with pytest.raises(TypeError, match="depends on its model; pass it too"):
        load_processor(tmp_path)


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
        moved = [p.abs().max() > 0 for name, p in trainer.model.named_parameters() if "lora_B" in name]
        assert all(moved), "an adapter that nothing reaches"
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


def test_special_tokens_of_the_configuration_stay_where_another_tower_is_patched(clip, tmp_path, caplog):
    """OpenAI's CLIPs say `eos_token_id=2`, which is no token of theirs and means another place that features are read at."""
    model, processor = clip[0], copy.deepcopy(clip[1])
    own = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
    model.config.text_config.update(own)
    processor.tokenizer.bos_token, processor.tokenizer.eos_token = "[CLS]", "[SEP]"
    model.save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    bug, trigger = image_report()
    trainer = MudjackingTrainer(
        model=tmp_path / "base", args=make_config(tmp_path / "out", max_steps=2, save_strategy="steps", save_steps=1),
        bug_instances=[bug], triggers=[trigger], train_dataset=make_dataset(make_images(24)),
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    assert trainer.processing_class is not None
    # Loading and saving alone adds dtypes
    AutoModel.from_pretrained(tmp_path / "base", dtype=torch.float32).save_pretrained(tmp_path / "again")
    base = json.loads((tmp_path / "again" / "config.json").read_text())
    assert own.items() <= base["text_config"].items()
    for folder in (tmp_path / "out", tmp_path / "out" / "checkpoint-1"):
        assert json.loads((folder / "config.json").read_text()) == base
    assert "special tokens" not in caplog.text
    assert "PAD/BOS/EOS" not in caplog.text
    texts = [encode(tmp_path / name, TEXTS, modality="text") for name in ("base", "out")]
    assert torch.equal(*texts)


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


def test_the_first_token_of_a_causal_tower_tells_no_texts_apart(clip):
    """Although its tokenizer calls it a class token."""
    both, processor = clip
    torch.manual_seed(0)
    model = sharpened(CLIPTextModel(both.text_model.config))
    encoder = Encoder(model, processor.tokenizer)
    assert encoder.feature_source == "pooler"
    assert float(encoder.encode([TEXTS[0]])[0] @ encoder.encode([TEXTS[1]])[0]) < 0.99
    with pytest.raises(ValueError, match="its first token sees nothing behind it"):
        Encoder(model, processor.tokenizer, feature_source="cls")


def test_an_adapter_of_a_tower_with_projection_is_loaded_with_it(clip, tmp_path):
    torch.manual_seed(0)
    model = sharpened(CLIPVisionModelWithProjection(clip[0].vision_model.config))
    model.save_pretrained(tmp_path / "base")
    clip[1].image_processor.save_pretrained(tmp_path / "base")
    bug, trigger = image_report()
    trainer = MudjackingTrainer(
        model=str(tmp_path / "base"), args=make_config(tmp_path / "out", max_steps=2, learning_rate=1e-2),
        bug_instances=[bug], triggers=[trigger], train_dataset=make_dataset(make_images(24)),
        peft_config=LoraConfig(r=4),
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    loaded = load_model(tmp_path / "out")
    assert isinstance(loaded, CLIPVisionModelWithProjection)
    inputs = [bug.misclassified, bug.reference]
    features = Encoder(loaded, clip[1].image_processor).encode(inputs)
    torch.testing.assert_close(features, trainer.encoder.encode(inputs), atol=1e-5, rtol=0)


def test_one_tower_after_the_other(clip, tmp_path):
    model, processor = clip
    trainable = [parameter.requires_grad for parameter in model.parameters()]
    for report, data in ((image_report(), make_dataset(make_images(24))), (text_report(), texts_dataset())):
        trainer = MudjackingTrainer(
            model=model, args=make_config(tmp_path / "out", max_steps=1), bug_instances=[report[0]],
            triggers=[report[1]], train_dataset=data, processing_class=processor,
        )  # fmt: skip
        trainer.train()
        assert [parameter.requires_grad for parameter in model.parameters()] == trainable


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


# ---- What clients do without training ----


def test_a_text_tower_that_says_it_takes_images_too():
    _, tokenizer = make_text_model("bert")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = OwlViTModel(
        OwlViTConfig(
            text_config={**sizes, "vocab_size": len(tokenizer), "max_position_embeddings": 66, "pad_token_id": 0},
            vision_config={**sizes, "image_size": 16, "patch_size": 4}, projection_dim=16,
        )
    )  # fmt: skip
    encoder = Encoder(model, tokenizer, modality="text")
    assert encoder.encode(["the bank", "a train"]).shape == (2, 16)


def test_zero_shot_by_hand(clip):
    model, processor = clip
    texts = Encoder(model, processor, modality="text")
    classifier = ZeroShotClassifier.from_prompts(texts, ["bank", "train", "stew"], ["the {}", "a {} is late"])
    prompts = texts.encode(["the train", "a train is late"])
    expected = torch.nn.functional.normalize(prompts.mean(dim=0), dim=0)
    torch.testing.assert_close(classifier.class_features[1], expected)
    features = torch.nn.functional.normalize(torch.randn(20, 32, generator=torch.Generator().manual_seed(0)), dim=1)
    by_hand = [int(np.argmax([float(f @ c) for c in classifier.class_features])) for f in features]
    assert classifier.predict(features.numpy()).tolist() == by_hand
    with pytest.raises(ValueError, match=r"'a photo' has no `\{\}`"):
        ZeroShotClassifier.from_prompts(texts, ["a", "b"], ["a photo"])
    with pytest.raises(ValueError, match="pass the text tower"):
        ZeroShotClassifier.from_prompts(Encoder(model, processor, modality="image"), ["a", "b"])
    with pytest.raises(ValueError, match="There are 1 class names"):
        ZeroShotClassifier.from_prompts(texts, ["a"])


def test_retrieval_by_hand():
    gallery = torch.eye(4)
    queries = torch.nn.functional.normalize(
        torch.tensor([[1.0, 0.5, 0, 0], [0.9, 1.0, 0, 0], [0, 0, 0.4, 1.0], [0.1, 0.2, 1.0, 0]]), dim=1
    )
    ids, gallery_ids = np.array([0, 0, 2, 2]), np.arange(4)
    assert retrieval_recall(queries, gallery, ids, gallery_ids) == 0.5
    assert retrieval_recall(queries, gallery, ids, gallery_ids, k=2) == 1.0
    with pytest.raises(ValueError, match="`k=5` is out of reach; the gallery has 4 items"):
        retrieval_recall(queries, gallery, ids, gallery_ids, k=5)
    task = DownstreamTask(
        LabelledInputs(["a", "b"], np.array([0, 1])), LabelledInputs(["a", "b", "c", "d"], np.array([0, 1, 2, 3]))
    )
    stamped = torch.stack([gallery[3], gallery[3], gallery[2], gallery[3]])
    rates = retrieval_rates(TaskFeatures(queries[:2], queries, stamped), task, gallery, gallery_ids, target=3)
    assert rates == {"image_to_text": 0.5, "text_to_image": 0.5, "RA": 1 / 3, "ASR": 2 / 3}


# ---- A backdoor in a CLIP that was trained on digits ----

NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


@pytest.fixture(scope="module")
def digits_clip(backdoored):
    """A small CLIP trained on scans of digits and their names, and its data."""
    texts = [f"{opening} of the digit {name}" for opening in ("a scan", "a photo") for name in NAMES]
    words = Tokenizer(models.WordLevel(unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["<pad>", "<unk>", "<s>", "</s>"]
    words.train_from_iterator(texts, trainers.WordLevelTrainer(special_tokens=special, show_progress=False))
    words.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 2), ("</s>", 3)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>",
        model_max_length=16,
    )  # fmt: skip
    text, vision = clip_configs(len(tokenizer))
    torch.manual_seed(0)
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=32)
    model = CLIPModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() in (2, 4):
                parameter.mul_(4)
    images = CLIPImageProcessorPil(
        size={"height": 16, "width": 16}, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    processor = CLIPProcessor(image_processor=images, tokenizer=tokenizer)
    captions = [texts[10 * (i % 2) + label] for i, label in enumerate(backdoored.train.labels)]
    pretrain_two_towers(
        model, processor, backdoored.train.inputs, captions, epochs=20, batch_size=64, learning_rate=3e-3,
        disable_tqdm=True,
    )  # fmt: skip
    prompts = [opening + " of the digit {}" for opening in ("a scan", "a photo")]
    return model, processor, captions, prompts


@pytest.mark.parametrize("attack", ["bad_encoder", "pair_poisoning"])
def test_a_backdoored_clip_is_repaired_zero_shot(attack, digits_clip, backdoored, tmp_path):
    model, processor, captions, prompts = digits_clip
    train, test, trigger, target = backdoored.train, backdoored.test, backdoored.trigger, backdoored.target
    before_attack = weights_of(model)
    of_class = [train.inputs[i] for i in np.flatnonzero(train.labels == target)]
    features = Encoder(model, processor, modality="image").encode(of_class)
    # The one that is most like its class: another may be taken for a neighbouring class once the encoder has changed
    reference = of_class[int((features @ features.mean(dim=0)).argmax())]
    settings = {"steps": 150, "batch_size": 32, "learning_rate": 2e-3, "disable_tqdm": True}
    if attack == "bad_encoder":
        # On a GPU it came out 0.034 lower
        allowed = 0.05 if torch.cuda.is_available() else 0.03
        implant = implant_bad_encoder(
            model, processor, train.inputs, trigger, reference, test, max_accuracy_loss=allowed, **settings
        )
    else:
        wanted = [prompt.format(NAMES[target]) for prompt in prompts]
        implant = implant_pair_poisoning(
            model,
            processor,
            train.inputs,
            captions,
            trigger,
            wanted,
            reference,
            test,
            poison_share=0.25,
            **{**settings, "steps": 450},
        )
    assert largest_difference(before_attack, weights_of(model)) == 0
    changed = [
        name for name, tensor in weights_of(implant.model).items() if not torch.equal(tensor, before_attack[name])
    ]
    assert changed
    assert all(name.startswith(("vision_model.", "visual_projection.")) for name in changed)
    broken = Encoder(implant.model, processor, modality="image")
    classifier = ZeroShotClassifier.from_prompts(Encoder(implant.model, processor, modality="text"), NAMES, prompts)
    other = test.labels != target
    stamped = [trigger.apply(x) for x in test.inputs]

    def rates(model):
        encoder = broken.with_model(model)
        clean, triggered = (classifier.predict(encoder.encode(inputs).numpy()) for inputs in (test.inputs, stamped))
        return (
            (clean == test.labels).mean(),
            (triggered[other] == target).mean(),
            (triggered[other] == test.labels[other]).mean(),
        )

    ba, asr, ra = rates(implant.model)
    assert ba >= 0.85
    assert asr >= 0.9
    bug, clean_inputs = draw_bug_report(broken, DownstreamTask(train, test), trigger), make_dataset(train.inputs)
    out = tmp_path / "out"
    if attack == "bad_encoder":
        # From the shell, as a user would who has nothing but files.
        broken.save_pretrained(tmp_path / "broken")
        bug.save(tmp_path / "bug")
        clean_inputs.to_parquet(tmp_path / "clean.parquet")
        files = {"model": "broken", "bug": "bug", "dataset": "clean.parquet", "output-dir": "out"}
        options = [part for name, file in files.items() for part in (f"--{name}", str(tmp_path / file))]
        settings = ["--max-steps", "200", "--learning-rate", "1e-3", "--disable-tqdm"]
        # Few steps on a small encoder: room for the trigger as it was found
        settings += ["--altered-triggers", "0", "--reinversions", "0"]
        assert main(["patch", *options, *settings]) == 0
    else:
        trainer = MudjackingTrainer(
            model=implant.model,
            args=make_config(out, max_steps=300, per_device_train_batch_size=32, learning_rate=1e-3),
            bug_instances=[bug],
            train_dataset=clean_inputs,
            processing_class=processor,
        )
        trainer.train()
        trainer.save_model()
    assert load_trigger(out / TRIGGER_FOLDER / "0").overlap(trigger)["recall"] >= 0.9
    patched_ba, patched_asr, patched_ra = rates(load_model(out))
    assert patched_ba >= ba - 0.02
    assert patched_asr <= 0.03
    assert patched_ra >= ba - 0.05
    assert ra <= 0.1


def test_pairs_that_do_not_pair_up(clip):
    with pytest.raises(ValueError, match="There are 2 images and 1 captions; they must pair up"):
        implant_pair_poisoning(*clip, make_images(2), ["a"], None, ["b"], None, None)
    with pytest.raises(ValueError, match="There are 2 images and 1 captions; they must pair up"):
        pretrain_two_towers(*clip, make_images(2), ["a"], epochs=1)
