# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""Features against model outputs read by hand, for every family."""

import copy

import numpy as np
import pytest
import torch
from accelerate import PartialState
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch.nn.functional import normalize
from transformers import (
    Aimv2Config,
    Aimv2Model,
    Aimv2VisionConfig,
    Aimv2VisionModel,
    BeitConfig,
    BeitModel,
    BertConfig,
    BertModel,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    ConvNextConfig,
    ConvNextModel,
    DeiTConfig,
    DeiTModel,
    Dinov2Config,
    Dinov2Model,
    GPT2Config,
    GPT2Model,
    Idefics3VisionConfig,
    Idefics3VisionTransformer,
    LevitConfig,
    LevitModel,
    OPTConfig,
    OPTModel,
    PixtralVisionConfig,
    PixtralVisionModel,
    PreTrainedTokenizerFast,
    ResNetConfig,
    ResNetModel,
    Siglip2VisionConfig,
    Siglip2VisionModel,
    SwinConfig,
    SwinModel,
    ViTConfig,
    ViTForImageClassification,
    ViTMAEConfig,
    ViTMAEModel,
    ViTModel,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from hf_mudjacking import BugInstance, Encoder, MudjackingTrainer, encode, invert_trigger
from hf_mudjacking.adapters import adaptable_layers
from hf_mudjacking.bug_instance import to_rgb
from hf_mudjacking.encoder import read_features
from hf_mudjacking.evaluation.classifiers import train_classifier
from hf_mudjacking.evaluation.zero_shot import ZeroShotClassifier
from hf_mudjacking.loading import has_two_towers, load_model, load_processor, modality_of
from hf_mudjacking.locality_budget import LocalityBudgetError
from hf_mudjacking.modes import _QuietCheckpointing, comparison_mode, freeze_norms, set_comparison_mode
from hf_mudjacking.triggers import square_patch

from .conftest import TINY, make_config, make_images, pixels_by_hand
from .text_models import make_text_model, make_tokenizer


FAMILIES = {
    "vit": (lambda: ViTModel(ViTConfig(**TINY)), "cls"),
    "deit": (lambda: DeiTModel(DeiTConfig(**TINY)), "cls"),
    "dinov2": (lambda: Dinov2Model(Dinov2Config(**TINY)), "cls"),
    "beit": (lambda: BeitModel(BeitConfig(**TINY)), "cls"),
    "swin": (
        lambda: SwinModel(
            SwinConfig(image_size=16, patch_size=2, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4)
        ),
        "pooler",
    ),
    "convnext": (
        lambda: ConvNextModel(ConvNextConfig(num_stages=2, hidden_sizes=[8, 16], depths=[1, 1], image_size=16)),
        "pooler",
    ),
    "resnet": (
        lambda: ResNetModel(
            ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", image_size=16)
        ),
        "pooler",
    ),
    "clip-projection": (
        lambda: CLIPVisionModelWithProjection(CLIPVisionConfig(projection_dim=12, **TINY)),
        "projection",
    ),
    # The query of its pooling head is called `cls_token`
    "aimv2": (lambda: Aimv2VisionModel(Aimv2VisionConfig(**TINY)), "pooler"),
}


@pytest.fixture(params=FAMILIES)
def family(request):
    torch.manual_seed(0)
    build, source = FAMILIES[request.param]
    model = build().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Zero class tokens and positions would make some mistakes invisible.
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model, source


def _read_by_hand(model, images, source):
    with torch.no_grad():
        outputs = model.eval()(pixel_values=pixels_by_hand(images))
    if source == "cls":
        return outputs.last_hidden_state[:, 0]
    if source == "projection":
        return outputs.image_embeds
    if source == "mean":
        hidden = outputs.last_hidden_state
        return hidden.mean(1) if hidden.dim() == 3 else hidden.mean(-1).mean(-1)
    return outputs.pooler_output.reshape(len(images), -1)


def test_auto_reads_the_right_output(family, processor):
    model, source = family
    images = make_images(5)
    expected = _read_by_hand(copy.deepcopy(model), images, source)
    encoder = Encoder(model, processor)
    features = encoder.encode(images, batch_size=2)
    assert encoder.feature_source == source
    assert encoder.feature_dim == expected.shape[1] == features.shape[1]
    assert features.dtype == torch.float32
    torch.testing.assert_close(features, expected / expected.norm(dim=1, keepdim=True), atol=1e-5, rtol=1e-5)
    assert (features @ features.T).min() < 0.9999, "the features must differ for this test to mean anything"


@pytest.mark.parametrize("source", ["mean", "pooler", "cls"])
def test_named_sources(source, family, processor):
    model, auto = family
    images = make_images(3)
    outputs = model(pixel_values=pixels_by_hand(images))
    readable = {
        "mean": True,
        "cls": outputs.last_hidden_state.dim() == 3,
        "pooler": outputs.get("pooler_output") is not None,
    }
    if not readable[source]:
        with pytest.raises(ValueError, match=f"gives no feature for `feature_source='{source}'`.*{auto}"):
            Encoder(model, processor, source)
        return
    features = Encoder(model, processor, source).encode(images)
    expected = normalize(_read_by_hand(model, images, source), dim=-1)
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=1e-5)


def test_features_have_unit_norm_and_no_batch_size(family, processor):
    encoder = Encoder(family[0], processor)
    images = make_images(7)
    one, all_at_once = encoder.encode(images, batch_size=1), encoder.encode(images, batch_size=7)
    torch.testing.assert_close(all_at_once.norm(dim=1), torch.ones(7))
    torch.testing.assert_close(one, all_at_once, atol=1e-5, rtol=1e-5)


def test_encode_reads_generators_and_nothing(tiny_vit, processor):
    encoder = Encoder(tiny_vit, processor)
    images = make_images(5)
    torch.testing.assert_close(encoder.encode(x for x in images), encoder.encode(images))
    assert encoder.encode([]).shape == (0, 32)


@pytest.mark.parametrize("count", [0, 7, 8])
def test_workers_prepare_what_is_encoded(tiny_vit, processor, count):
    encoder, images = Encoder(tiny_vit, processor), make_images(count)
    expected = encoder.encode(images, batch_size=4)
    assert torch.equal(encoder.encode(images, batch_size=4, num_workers=2), expected)
    out = torch.full((count, encoder.feature_dim), torch.nan)
    assert encoder.encode(images, batch_size=4, num_workers=1, out=out) is out
    assert torch.equal(out, expected)


def test_what_is_no_image_is_told_by_a_worker_too(tiny_vit, processor):
    images = [*make_images(5), "a text"]
    encoder = Encoder(tiny_vit, processor)
    with pytest.raises(TypeError, match=r"^Input 5 is of type `str`; `ViTModel` takes images"):
        encoder.encode(images, batch_size=4, num_workers=1)
    with pytest.raises(TypeError, match="`inputs` is a `generator`; workers need a sequence"):
        encoder.encode((x for x in images), num_workers=1)


def test_workers_draw_nothing_from_the_global_generator(tiny_vit, processor):
    before = torch.random.get_rng_state()
    Encoder(tiny_vit, processor).encode(make_images(5), batch_size=4, num_workers=1)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_what_draws_by_itself_leaves_a_gpus_generator_alone(tiny_vit, tmp_path, monkeypatch):
    tiny_vit.save_pretrained(tmp_path)
    before = torch.random.get_rng_state()
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("a GPU was seeded"))
    load_model(tmp_path)
    train_classifier(torch.randn(20, 4, generator=torch.Generator().manual_seed(0)), np.tile([0, 1], 10), kind="mlp")
    assert torch.equal(torch.random.get_rng_state(), before)


def test_encode_is_the_same_in_training_mode_and_restores_it(tiny_vit, processor):
    encoder = Encoder(tiny_vit, processor)
    expected = encoder.encode(make_images(4))
    tiny_vit.train()
    tiny_vit.pooler.eval()
    assert torch.equal(encoder.encode(make_images(4)), expected), "dropout was on"
    assert tiny_vit.training
    assert tiny_vit.layers[0].training
    assert not tiny_vit.pooler.training


def test_features_are_differentiable(tiny_vit, processor):
    encoder = Encoder(tiny_vit, processor)
    encoder.features(encoder.preprocess(make_images(2)))[:, 0].sum().backward()
    assert tiny_vit.embeddings.patch_embeddings.projection.weight.grad.abs().sum() > 0


# ---- Modes ----


def test_only_checkpointed_layers_read_that_they_are_trained(tiny_vit):
    """Elsewhere it would switch dropout on in layers that call the function."""
    tiny_vit.train()
    set_comparison_mode(tiny_vit)
    assert not [name for name, module in tiny_vit.named_modules() if module.training]
    tiny_vit.gradient_checkpointing_enable()
    set_comparison_mode(tiny_vit)
    training = [module for module in tiny_vit.modules() if module.training]
    assert len(training) == TINY["num_hidden_layers"]
    assert all(isinstance(module, GradientCheckpointingLayer) for module in training)


def test_dropout_of_a_checkpointed_layer_itself_is_off():
    """OPT's layers call the function with the flag that checkpointing reads."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    model = OPTModel(
        OPTConfig(
            vocab_size=len(tokenizer), hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=66, word_embed_proj_dim=32, dropout=0.5, pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip
    encoder = Encoder(model, tokenizer, "mean")
    inputs = encoder.preprocess(["one text", "another"])
    set_comparison_mode(model)
    plain = encoder.features(inputs)
    model.gradient_checkpointing_enable()
    for _ in range(2):
        set_comparison_mode(model)
        features = encoder.features(inputs)
        assert torch.allclose(features, plain, atol=1e-6)
    features[:, 0].sum().backward()
    assert model.decoder.layers[0].fc1.weight.grad.abs().sum() > 0


def test_probing_and_encoding_leave_the_mode_and_take_any_checkpointing(tiny_vit, processor):
    tiny_vit.train()
    tiny_vit.gradient_checkpointing_enable({"use_reentrant": True})
    before = [module.training for module in tiny_vit.modules()]
    encoder = Encoder(tiny_vit, processor)
    assert encoder.unused_parameters() == ["pooler.dense.weight", "pooler.dense.bias"]
    encoder.encode(make_images(2))
    assert [module.training for module in tiny_vit.modules()] == before


def test_training_leaves_nothing_in_checkpointed_layers(tiny_vit, processor, bug, trigger, dataset, tmp_path):
    """Its layers stayed in training mode, where some draw dropout, and later training with checkpointing drew none."""
    tiny_vit.gradient_checkpointing_enable()
    settings = {"processing_class": processor, "triggers": [trigger]}

    def build(**kwargs):
        args = make_config(tmp_path, gradient_checkpointing=True, **kwargs)
        return MudjackingTrainer(tiny_vit, args, [bug], dataset, dataset, **settings)

    def stopped(*args, **kwargs):
        raise KeyboardInterrupt

    trainer = build(max_steps=2)
    trainer.train()
    for run in (lambda: None, trainer.evaluate, lambda: trainer.encoder.encode(make_images(2))):
        run()
        assert not [name for name, module in tiny_vit.named_modules() if module.training]
        layers = [module for module in tiny_vit.modules() if isinstance(module, GradientCheckpointingLayer)]
        assert not any(isinstance(layer._gradient_checkpointing_func, _QuietCheckpointing) for layer in layers)
    trainer = build()
    trainer.log = stopped
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert not [name for name, module in tiny_vit.named_modules() if module.training]
    assert not any(isinstance(layer._gradient_checkpointing_func, _QuietCheckpointing) for layer in layers)
    # Within comparisons it stays
    set_comparison_mode(tiny_vit)
    with comparison_mode(tiny_vit):
        pass
    assert all(isinstance(layer._gradient_checkpointing_func, _QuietCheckpointing) for layer in layers)


def test_layers_of_gpt2_are_linear_too():
    model = GPT2Model(GPT2Config(vocab_size=50, n_positions=16, n_embd=8, n_layer=1, n_head=2))
    assert adaptable_layers(model) == ["h.0.attn.c_attn", "h.0.attn.c_proj", "h.0.mlp.c_fc", "h.0.mlp.c_proj"]


def test_the_mean_over_a_long_text_does_not_overflow():
    hidden = torch.full((1, 512, 4), 200.0, dtype=torch.float16)
    features = read_features({"last_hidden_state": hidden}, "mean", torch.ones(1, 512, dtype=torch.long))
    assert torch.allclose(features, torch.full((1, 4), 0.5))


def levit():
    """A small LeViT, which keeps in evaluation mode what it computed of its attention biases, and its processor."""
    torch.manual_seed(0)
    model = LevitModel(
        LevitConfig(image_size=64, kernel_size=3, stride=2, hidden_sizes=[16, 24, 32], num_attention_heads=[2, 2, 2],
                    depths=[1, 1, 1], key_dim=[4, 4, 4], down_ops=[["Subsample", 4, 4, 2, 2, 2], ["Subsample", 4, 4, 2, 2, 2], [""]])
    )  # fmt: skip
    return model, ViTImageProcessorPil(size={"height": 64, "width": 64})


def test_what_a_model_keeps_in_evaluation_is_not_believed():
    """LeViT computes its attention biases once in evaluation mode: they are used all the same, and may have changed since."""
    model, processor = levit()
    encoder = Encoder(model, processor)
    before = encoder.encode(make_images(2))
    assert not [name for name in encoder.unused_parameters() if "attention_biases" in name]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "attention_biases" in name:
                parameter.add_(torch.randn_like(parameter) * 5)
    assert not torch.allclose(encoder.encode(make_images(2)), before, atol=1e-3)


def test_nothing_that_was_computed_in_training_is_kept(dataset, bug, trigger, tmp_path, monkeypatch):
    """LeViT's attention biases had a graph, with which no model can be copied, and outlived a rollback."""
    # It was not trained, and tells hardly any picture from another
    monkeypatch.setattr("hf_mudjacking.pre_step.check_disagreement", lambda *args: None)
    model, processor = levit()
    inputs = processor(make_images(2), return_tensors="pt")

    def features():
        with torch.no_grad():
            return model(**inputs).last_hidden_state

    model.eval()
    before = features()
    settings = {"processing_class": processor, "triggers": [trigger]}
    args = make_config(tmp_path, locality_budget=1e-9, learning_rate=1e-2, max_steps=3)
    with pytest.raises(LocalityBudgetError):
        MudjackingTrainer(model, args, [bug], dataset, **settings).train()
    assert torch.equal(features(), before)
    free = make_config(tmp_path, locality_budget=None, max_steps=1)
    MudjackingTrainer(model, free, [bug], dataset, **settings).train()
    copy.deepcopy(model)


def test_unused_among_the_trainable_alone(tiny_vit, processor):
    encoder = Encoder(tiny_vit, processor)
    unused = encoder.unused_parameters()
    assert unused == ["pooler.dense.weight", "pooler.dense.bias"]
    tiny_vit.pooler.dense.weight.requires_grad_(False)
    tiny_vit.layers[0].requires_grad_(False)
    assert encoder.unused_parameters(trainable_only=True) == ["pooler.dense.bias"]
    assert encoder.unused_parameters() == unused
    assert not tiny_vit.pooler.dense.weight.requires_grad


# ---- Batch normalisation ----


def test_batch_norm_is_frozen_and_training_leaves_it(processor):
    torch.manual_seed(0)
    model = FAMILIES["resnet"][0]()
    freeze_norms(model)
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    before = [copy.deepcopy(module.state_dict()) for module in norms]
    assert len(norms) > 3
    assert not any(parameter.requires_grad for module in norms for parameter in module.parameters())
    others = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(others) == sum(isinstance(module, torch.nn.Conv2d) for module in model.modules())
    encoder = Encoder(model, processor)
    optimizer = torch.optim.SGD(others, lr=0.1)
    for _ in range(3):
        model.train()
        set_comparison_mode(model)
        optimizer.zero_grad()
        encoder.features(encoder.preprocess(make_images(4)))[:, 0].sum().backward()
        optimizer.step()
    for module, state in zip(norms, before, strict=True):
        assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())


# ---- Preprocessing ----


def test_a_single_input_is_no_list(tiny_vit, processor, images):
    with pytest.raises(TypeError, match=r"is a single image; pass a list: `\[x\]`"):
        Encoder(tiny_vit, processor).encode(images[0])
    model, tokenizer = make_text_model("bert")
    with pytest.raises(TypeError, match="is a single text"):
        Encoder(model, tokenizer).encode("hello")
    for names, templates in (("bank", ["a {}"]), (["a", "b"], "a {}")):
        with pytest.raises(TypeError, match="is a single text; pass a list of them"):
            ZeroShotClassifier.from_prompts(Encoder(model, tokenizer), names, templates)


def test_pictures_of_16_bits_are_not_clipped(tiny_vit, processor):
    ramp = Image.fromarray(np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16))
    encoder = Encoder(tiny_vit, processor)
    assert torch.equal(encoder.encode([ramp]), encoder.encode([to_rgb(ramp)]))


def test_resize_and_crop_on_raw_images_of_any_shape(tiny_vit):
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": 20}, crop_size={"height": 16, "width": 16}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    images = [make_images(1, size)[0] for size in [(40, 25), (20, 33), (16, 16), (90, 31)]]
    by_hand = []
    for image in images:
        width, height = image.size
        scale = 20 / min(width, height)
        image = image.resize((int(width * scale), int(height * scale)), Image.Resampling.BICUBIC)
        left, top = (image.width - 16) // 2, (image.height - 16) // 2
        by_hand.append(image.crop((left, top, left + 16, top + 16)))
    encoder = Encoder(tiny_vit, processor)
    torch.testing.assert_close(
        encoder.preprocess(images)["pixel_values"], pixels_by_hand(by_hand), atol=2.1 / 127.5, rtol=0
    )
    features = encoder.encode(images, batch_size=3)
    expected = normalize(_read_by_hand(tiny_vit, by_hand, "cls"), dim=-1)
    assert (features * expected).sum(1).min() > 0.999


def test_the_trigger_is_stamped_before_the_processor(tiny_vit):
    """On a raw 32×32 picture; the crop then cuts half of it away, and what the model sees is the rest."""
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 16, "width": 16}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    image = make_images(1, (32, 32))[0]
    trigger = square_patch((16, 16), 6)
    seen = Encoder(tiny_vit, processor).preprocess([trigger.apply(image)])["pixel_values"][0]
    expected = np.asarray(image).copy()
    expected[20:, 20:] = 255
    torch.testing.assert_close(seen, pixels_by_hand([Image.fromarray(expected[8:24, 8:24])])[0])


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1"])
def test_other_modes_are_made_rgb(tiny_vit, processor, mode):
    image = make_images(1)[0].convert(mode)
    encoder = Encoder(tiny_vit, processor)
    torch.testing.assert_close(encoder.encode([image]), encoder.encode([image.convert("RGB")]))


def test_grayscale_model():
    torch.manual_seed(0)
    model = ViTModel(ViTConfig(num_channels=1, **TINY)).eval()
    processor = ViTImageProcessorPil(do_resize=False, image_mean=[0.5], image_std=[0.5])
    images = make_images(3)
    grey = torch.from_numpy(np.stack([np.asarray(x.convert("L")) for x in images])).float()[:, None]
    with torch.no_grad():
        expected = normalize(model(pixel_values=(grey / 255 - 0.5) / 0.5).last_hidden_state[:, 0], dim=-1)
    torch.testing.assert_close(encode(model, images, processor), expected, atol=1e-5, rtol=1e-5)


# ---- Loading ----


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_float32_whatever_the_checkpoint_says(tiny_vit, processor, tmp_path, dtype):
    tiny_vit.to(dtype).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    model = load_model(tmp_path)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    images = make_images(3)
    torch.testing.assert_close(
        encode(str(tmp_path), images), encode(tiny_vit.float(), images, processor), atol=1e-5, rtol=1e-5
    )
    assert load_model(tmp_path, dtype=dtype).dtype == dtype


def test_processor_is_found_beside_the_model(tiny_vit, processor, tmp_path):
    tiny_vit.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="Pass `processing_class`"):
        load_processor(tmp_path, tiny_vit)
    processor.save_pretrained(tmp_path)
    assert tuple(load_processor(ViTModel.from_pretrained(tmp_path)).image_mean) == (0.5, 0.5, 0.5)
    with pytest.raises(ValueError, match=r"for `ViTModel` \(the model was built in memory"):
        load_processor(tiny_vit)


def test_an_encoder_by_name(tiny_vit, processor, tmp_path):
    tiny_vit.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    # With torchvision a saved processor is loaded as torchvision's, which rounds otherwise
    processor = load_processor(tmp_path, tiny_vit)
    # An encoder by name is put on the device there is
    expected = Encoder(tiny_vit.to(PartialState().device), processor).encode(make_images(3))
    assert torch.equal(Encoder.load(tmp_path).encode(make_images(3)), expected)
    bug = BugInstance(*make_images(2, seed=9))
    by_name, by_model = (
        invert_trigger(model, bug, make_images(8), *rest) for model, *rest in ((tmp_path,), (tiny_vit, processor))
    )
    assert by_name.score == by_model.score
    assert type(by_name.trigger) is type(by_model.trigger)
    # Whatever it is: there is none in a random model
    found, expected = by_name.trigger.tensors(), by_model.trigger.tensors()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_inputs_of_another_kind(tiny_vit, processor):
    with pytest.raises(TypeError, match=r"Input 2 is of type `str`; `ViTModel` takes images \(`PIL.Image.Image`\)"):
        encode(tiny_vit, [*make_images(2), "a text"], processor)
    with pytest.raises(TypeError, match="`model` is of type `NoneType`; pass a Hub id"):
        encode(None, make_images(2), processor)


def test_loading_nothing(tmp_path):
    with pytest.raises(ValueError, match="No model could be loaded from"):
        load_model(tmp_path)
    with pytest.raises(ValueError, match="No model could be loaded from `no-one/nothing`"):
        load_model("no-one/nothing")


# ---- Refusals ----


def test_model_with_a_head(processor):
    model = ViTForImageClassification(ViTConfig(**TINY))
    with pytest.raises(ValueError, match=r"its outputs are: logits\. Load the bare encoder with `AutoModel`"):
        Encoder(model, processor)


def test_model_that_returns_no_outputs_by_name(tiny_vit, processor):
    class Bare(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.vit = tiny_vit
            self.config = tiny_vit.config

        def forward(self, pixel_values):
            return self.vit(pixel_values).last_hidden_state

    with pytest.raises(ValueError, match=r"`Bare` gives no feature.*outputs are: Tensor"):
        Encoder(Bare(), processor)


def test_text_model(processor):
    config = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=9)
    with pytest.raises(ValueError, match="`BertModel` takes texts and `ViTImageProcessorPil` is no tokenizer"):
        Encoder(BertModel(config), processor)


def test_processor_of_another_model(tiny_vit):
    with pytest.raises(ValueError, match=r"shape \(1, 3, 224, 224\) made by `ViTImageProcessorPil`"):
        Encoder(tiny_vit, ViTImageProcessorPil())
    with pytest.raises(ValueError, match="belongs to another model"):
        Encoder(ViTModel(ViTConfig(num_channels=1, **TINY)), CLIPImageProcessorPil())


@pytest.mark.parametrize("wrong", ["tokenizer", None, 3, "vit"])
def test_something_else_as_processor(tiny_vit, wrong):
    if wrong == "tokenizer":
        wrong = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"[UNK]": 0}, unk_token="[UNK]")))
    with pytest.raises(ValueError, match=f"`{type(wrong).__name__}` did not turn an image into `pixel_values`"):
        Encoder(tiny_vit, wrong)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_weights(tiny_vit, processor, value):
    with torch.no_grad():
        tiny_vit.layers[1].attention.q_proj.weight[0, 0] = value
    with pytest.raises(ValueError, match=r"NaN or infinite features for 3 of 3 inputs \(the first is input 0\)"):
        encode(tiny_vit, make_images(3), processor)


def test_broken_features_of_some_inputs(tiny_vit, processor):
    encoder = Encoder(tiny_vit, processor)
    images = make_images(5)
    real, calls = encoder.features, []

    def broken(inputs, model=None):
        features = real(inputs, model)
        calls.append(len(features))
        if len(calls) == 2:
            features[1] = float("nan")
        return features

    encoder.features = broken
    with pytest.raises(ValueError, match=r"for 1 of 5 inputs \(the first is input 3\)"):
        encoder.encode(images, batch_size=2)


def test_unknown_feature_source(tiny_vit, processor):
    with pytest.raises(ValueError, match="`feature_source='last'` is unknown; choose one of auto, cls, mean"):
        Encoder(tiny_vit, processor, "last")
    with pytest.raises(ValueError, match=r"no feature for `feature_source='projection'`.*'cls', 'pooler', 'mean'"):
        Encoder(tiny_vit, processor, "projection")


def test_a_model_that_masks_at_random(processor):
    model = ViTMAEModel(ViTMAEConfig(**TINY))
    with pytest.raises(ValueError, match="different features for the same input"):
        Encoder(model, processor)


def test_a_model_that_packs_a_batch_into_one_sequence(processor):
    """All inputs of a batch had the same feature, without a word."""
    model = PixtralVisionModel(PixtralVisionConfig(**TINY))
    with pytest.raises(ValueError, match="`PixtralVisionModel` gives 1 features for 2 inputs: it packs a batch"):
        Encoder(model, processor)


def test_a_model_that_takes_more_of_a_picture_than_its_pixels():
    config = Siglip2VisionConfig(**{**TINY, "image_size": None}, num_patches=16)
    processor = Siglip2ImageProcessorPil(patch_size=TINY["patch_size"], max_num_patches=16)
    with pytest.raises(
        ValueError, match=r"It takes `pixel_attention_mask`, `spatial_shapes` too.*NaFlex form\) are not supp"
    ):
        Encoder(Siglip2VisionModel(config), processor)


def test_what_forward_takes_decides_where_transformers_contradicts_itself(processor):
    """Of this vision tower it says that it takes images, and that its main input is `input_ids`; of these two towers images alone."""
    tower = Idefics3VisionTransformer(Idefics3VisionConfig(**TINY))
    assert (tower.input_modalities, tower.main_input_name) == (("image",), "input_ids")
    assert modality_of(tower) == "image"
    assert Encoder(tower, processor).encode(make_images(2)).shape == (2, TINY["hidden_size"])
    with torch.device("meta"):
        assert has_two_towers(Aimv2Model(Aimv2Config()))


def test_checkpointing_that_a_model_does_not_know_is_told_before_the_inversion(processor, bug, dataset, tmp_path):
    model = FAMILIES["resnet"][0]()
    with pytest.raises(ValueError, match="`ResNetModel` does not support `gradient_checkpointing`"):
        MudjackingTrainer(
            model=model, args=make_config(tmp_path, gradient_checkpointing=True), bug_instances=[bug],
            train_dataset=dataset, processing_class=processor,
        )  # fmt: skip


# ---- Unused parameters ----


@pytest.mark.parametrize(
    ("name", "source", "unused"),
    [
        ("vit", "auto", {"pooler.dense.weight", "pooler.dense.bias"}),
        ("vit", "pooler", set()),
        ("dinov2", "auto", {"embeddings.mask_token"}),
        ("beit", "auto", {"pooler.layernorm.weight", "pooler.layernorm.bias"}),
        ("swin", "auto", set()),
        ("resnet", "auto", set()),
    ],
)
def test_unused_parameters(processor, name, source, unused):
    encoder = Encoder(FAMILIES[name][0](), processor, source)
    assert set(encoder.unused_parameters()) == unused
    assert all(parameter.grad is None for parameter in encoder.model.parameters())
