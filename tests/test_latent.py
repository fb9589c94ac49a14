"""What x_b has inside the encoder and x_r has not, carried by the rows of a report without a trigger."""

import copy

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import normalize
from transformers import AutoModel, CLIPVisionConfig, ResNetConfig, SegformerConfig, SwinConfig, ViTConfig
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from hf_mudjacking import BugInstance, Encoder, MudjackingTrainer
from hf_mudjacking.latent import LatentStamps, inner_layer
from hf_mudjacking.modes import set_comparison_mode

from .conftest import largest_difference, make_config, make_images, weights_of


SMALL = {
    "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 16, "image_size": 16,
    "patch_size": 8,
}  # fmt: skip
MODELS = {
    "layers.2": ViTConfig(**SMALL),
    "encoder.layers.2": CLIPVisionConfig(**SMALL),
    "encoder.stages.2": ResNetConfig(embedding_size=8, hidden_sizes=[8] * 4, depths=[1] * 4, layer_type="basic"),
    "encoder.layers.0": SwinConfig(
        image_size=16, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[1, 1], window_size=4
    ),
}


def encoder_of(config, side=16):
    torch.manual_seed(0)
    processor = ViTImageProcessorPil(size={"height": side, "width": side}, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    return Encoder(AutoModel.from_config(config).eval(), processor)


def outputs_of(layer, run):
    """What a layer gives while something runs."""
    seen = []
    handle = layer.register_forward_hook(
        lambda m, _, output: seen.append((output[0] if isinstance(output, tuple) else output).detach())
    )
    run()
    handle.remove()
    return seen[-1]


@pytest.mark.parametrize("name", MODELS)
def test_the_layer_is_found_in_any_model(name):
    encoder = encoder_of(MODELS[name])
    (image,) = make_images(1)
    layer = inner_layer(encoder, image)
    assert dict(encoder.model.named_modules())[name] is layer
    # transformers leaves a hook of its own, once
    left = [len(module._forward_hooks) for module in encoder.model.modules()]
    inner_layer(encoder, image)
    assert [len(module._forward_hooks) for module in encoder.model.modules()] == left


def test_a_model_whose_hidden_states_no_module_gives_is_refused(tiny_vit, processor):
    encoder = Encoder(tiny_vit, processor)
    encoder.features_and_hidden_states = lambda inputs: (None, [torch.zeros(1)] * 3)
    with pytest.raises(ValueError, match="No module of `ViTModel` gives the hidden state"):
        inner_layer(encoder, make_images(1)[0])


def stamps_of(encoder, bugs, strength):
    spent = []
    return LatentStamps(encoder, bugs, strength, spent.append), spent


@pytest.mark.parametrize("name", MODELS)
def test_rows_carry_the_difference_of_their_report_or_are_pushed(name):
    encoder = encoder_of(MODELS[name])
    x_b, x_r, *others = make_images(9)
    stamps, spent = stamps_of(encoder, [None, BugInstance(x_b, x_r)], 0.6)
    assert spent == [2]
    hidden = outputs_of(stamps.layer, lambda: encoder.encode([x_b, x_r]))
    direction = normalize((hidden[0] - hidden[1]).flatten(), dim=0)
    pixels = encoder.preprocess(others)["pixel_values"]

    def run():
        encoder.features({"pixel_values": pixels})

    plain = outputs_of(stamps.layer, run)
    features = encoder.features({"pixel_values": pixels}).detach()
    # Five rows, second in a batch of seven, as stamped rows are after clean ones; of those of odd number, in turn, one carries
    # the difference and one is pushed
    with stamps.carried(pixels[1:6], torch.tensor([10, 13, 14, 11, 17]), first=1):
        change = (outputs_of(stamps.layer, run) - plain).flatten(1)
        changed = encoder.features({"pixel_values": pixels}).detach()
    assert spent == [2, 3]
    differing, pushed, others = [2, 5], 4, [0, 1, 3, 6]
    assert not change[others].any()
    assert torch.equal(features[others], changed[others])
    shares = change.norm(dim=1) / plain.flatten(1).norm(dim=1)
    golden = (5**0.5 - 1) / 2
    # Rows 13 and 17 are in turns 6 and 8
    assert torch.allclose(
        shares[differing], torch.tensor([0.6 * (golden * (t // 2 + 1) % 1) for t in (6, 8)]), rtol=1e-3
    )
    assert (normalize(change[differing], dim=1) @ direction > 0.999).all()
    assert shares[pushed] == pytest.approx(0.1, rel=1e-3)
    # Nothing is left behind
    assert torch.equal(features, encoder.features({"pixel_values": pixels}).detach())


def test_no_push_of_that_length_leads_further(tiny_vit, processor):
    """It is the steepest way to h(x_b): random changes of the same length gain less."""
    encoder = Encoder(tiny_vit.eval(), processor)
    bug = BugInstance(*make_images(2, seed=9))
    target = encoder.encode([bug.misclassified])[0]
    stamps, _ = stamps_of(encoder, [bug], 0.06)
    pixels = encoder.preprocess(make_images(4))["pixel_values"]

    def cosines():
        return encoder.features({"pixel_values": pixels}).detach() @ target

    before = cosines()
    with stamps.carried(pixels, torch.tensor([1, 3, 5, 7]), first=0):
        gained = cosines() - before
    assert (gained > 0).all()
    for seed in range(20):
        noise = torch.randn((4, *stamps.directions.shape[1:]), generator=torch.Generator().manual_seed(seed))
        handle = stamps.layer.register_forward_hook(
            lambda m, _, hidden, noise=noise: (
                hidden + 0.01 * noise * (hidden.flatten(1).norm(dim=1) / noise.flatten(1).norm(dim=1)).view(-1, 1, 1)
            )
        )
        assert (cosines() - before < gained).all()
        handle.remove()


def test_lengths_are_spread_over_the_whole_range(tiny_vit, processor):
    encoder = Encoder(tiny_vit, processor)
    stamps, _ = stamps_of(encoder, [BugInstance(*make_images(2))], 1.0)
    pixels = encoder.preprocess(make_images(50))["pixel_values"]
    plain = outputs_of(stamps.layer, lambda: encoder.features({"pixel_values": pixels}))
    with stamps.carried(pixels, 2 * torch.arange(50), first=0):
        stamped = outputs_of(stamps.layer, lambda: encoder.features({"pixel_values": pixels}))
    lengths = ((stamped - plain).flatten(1).norm(dim=1) / plain.flatten(1).norm(dim=1)).sort().values
    assert (lengths - (torch.arange(50) + 0.5) / 50).abs().max() < 0.03


def test_a_model_with_an_adapter_is_stamped_like_the_one_without(tiny_vit, processor):
    bug, pixels = (
        BugInstance(*make_images(2, seed=9)),
        Encoder(tiny_vit, processor).preprocess(make_images(4))["pixel_values"],
    )
    outputs = []
    for adapted in (False, True):
        model = get_peft_model(tiny_vit, LoraConfig(target_modules="all-linear")) if adapted else tiny_vit
        encoder = Encoder(model, processor)
        set_comparison_mode(model)
        stamps, _ = stamps_of(encoder, [bug], 0.6)
        with stamps.carried(pixels, torch.arange(4), first=0):
            outputs.append(encoder.features({"pixel_values": pixels}).detach())
    assert torch.allclose(*outputs, atol=1e-6)


def test_many_reports_go_through_in_parts(tiny_vit, processor):
    encoder = Encoder(tiny_vit, processor)
    images = make_images(40)
    bugs = [BugInstance(x_b, x_r) for x_b, x_r in zip(images[:20], images[20:], strict=True)]
    stamps, spent = stamps_of(encoder, bugs, 0.6)
    assert spent == [40]
    assert torch.allclose(stamps.targets, encoder.encode(images[:20]), atol=1e-6)
    one, _ = stamps_of(encoder, bugs[18:19], 0.6)
    assert torch.allclose(stamps.directions[18], one.directions[0], atol=1e-6)


def test_it_is_never_the_last_state_behind_which_nothing_could_learn():
    """Some models give no state of the embeddings, or have few layers."""
    small = {"hidden_sizes": [8] * 4, "num_attention_heads": [1] * 4, "depths": [1] * 4, "decoder_hidden_size": 8}
    for name, config, side in (
        ("stages.2", SegformerConfig(**small), 64),
        ("embeddings", ViTConfig(**{**SMALL, "num_hidden_layers": 1}), 16),
        ("layers.0", ViTConfig(**{**SMALL, "num_hidden_layers": 2}), 16),
    ):
        encoder = encoder_of(config, side)
        assert dict(encoder.model.named_modules())[name] is inner_layer(encoder, make_images(1)[0])


def test_two_reports_take_turns(tiny_vit, processor):
    encoder = Encoder(tiny_vit, processor)
    images = make_images(8)
    stamps, _ = stamps_of(encoder, [BugInstance(*images[:2]), BugInstance(*images[2:4])], 1.0)
    pixels = encoder.preprocess(images[4:])["pixel_values"]
    plain = outputs_of(stamps.layer, lambda: encoder.features({"pixel_values": pixels}))
    # All of even turn, of the one report and of the other
    with stamps.carried(pixels, torch.tensor([0, 1, 4, 5]), first=0):
        change = outputs_of(stamps.layer, lambda: encoder.features({"pixel_values": pixels})) - plain
    directions = normalize(change.flatten(1), dim=1) @ stamps.directions.flatten(1).T
    assert torch.equal(directions.argmax(dim=1), torch.tensor([0, 1, 0, 1]))
    assert (directions.max(dim=1).values > 0.999).all()


def test_recomputed_activations_carry_it_too(tiny_vit, processor):
    """With gradient checkpointing a layer runs again in the backward pass: gradients must be the same."""
    gradients = []
    for checkpointing in (None, {"use_reentrant": False}, {"use_reentrant": True}):
        model = copy.deepcopy(tiny_vit)
        if checkpointing:
            model.gradient_checkpointing_enable(checkpointing)
        encoder = Encoder(model, processor)
        set_comparison_mode(model)
        pixels = encoder.preprocess(make_images(4))["pixel_values"]
        stamps, _ = stamps_of(encoder, [BugInstance(*make_images(2, seed=5))], 1.0)
        with stamps.carried(pixels, torch.arange(4), first=0):
            # One kind of checkpointing asks for an input that takes gradients
            encoder.features({"pixel_values": pixels.clone().requires_grad_(True)})[:, 0].sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        model.zero_grad()
        encoder.features({"pixel_values": pixels})[:, 0].sum().backward()
        plain = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert largest_difference(gradients[-1], plain) > 1e-3
    for others in gradients[1:]:
        assert gradients[0].keys() == others.keys()
        assert largest_difference(gradients[0], others) < 1e-6


# --- in the trainer


def trained(backdoored, tmp_path, bugs, **kwargs):
    trainer = MudjackingTrainer(
        model=backdoored.model(),
        args=make_config(tmp_path, **{"max_steps": 2, "on_unverified": "patch", **kwargs}),
        bug_instances=bugs,
        train_dataset=backdoored.dataset(64),
        processing_class=backdoored.processor,
    )
    trainer.train()
    return trainer


def natural(backdoored):
    """A report without a trigger: two clean inputs of different classes."""
    labels = backdoored.test.labels
    return BugInstance(*(backdoored.test.inputs[int(np.argmax(labels == label))] for label in (3, 8)))


def test_rows_of_a_report_without_a_trigger_are_stamped_inside(backdoored, tmp_path, short_searches):
    bugs = [natural(backdoored)]
    trainer = trained(backdoored, tmp_path, bugs, latent_strength=0.6)
    plain = trained(backdoored, tmp_path / "plain", bugs)
    assert trainer.triggers == [None]
    assert plain._latent is None
    assert largest_difference(weights_of(trainer.encoder.model), weights_of(plain.encoder.model)) > 0
    # x_b and x_r once more; then, of two steps of eight rows, about every second one three times
    spent = trainer.forward_equivalents - plain.forward_equivalents - 2
    assert 0 < spent < 2 * 8 * 3
    assert spent % 3 == 0
    # In the picture they carry nothing
    assert trainer.data_collator.stamps == [[None]]
    # Gone once training is over: what is encoded now is the saved model
    assert not [hook for hook in trainer._latent.layer._forward_hooks.values() if "stamp_output" in str(hook)]


def test_nothing_is_stamped_that_no_loss_looks_at(backdoored, tmp_path, short_searches):
    trainer = trained(backdoored, tmp_path, [natural(backdoored)], latent_strength=0.6, generalizability_weight=0.0)
    assert trainer._latent is None


def test_reports_with_and_without_a_trigger_share_the_rows(backdoored, tmp_path, short_searches):
    trainer = trained(backdoored, tmp_path, [natural(backdoored), backdoored.bug()], latent_strength=0.6)
    assert [trigger is None for trigger in trainer.triggers] == [True, False]
    assert [stamps[0] is None for stamps in trainer.data_collator.stamps] == [False, True]
    assert trainer._latent._number_of == [None, 0]
    assert len(trainer._latent.targets) == 1


def test_accumulated_batches_are_stamped_alike(backdoored, tmp_path, short_searches):
    bugs = [natural(backdoored)]
    whole = trained(backdoored, tmp_path / "a", bugs, latent_strength=0.6)
    halves = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    parts = trained(backdoored, tmp_path / "b", bugs, latent_strength=0.6, **halves)
    assert largest_difference(weights_of(whole.encoder.model), weights_of(parts.encoder.model)) < 2e-5


def test_where_the_inside_cannot_be_reached_a_warning_says_so(
    backdoored, tmp_path, short_searches, caplog, monkeypatch
):
    monkeypatch.setattr(Encoder, "features_and_hidden_states", lambda self, inputs: (None, [torch.zeros(1)] * 3))
    trainer = trained(backdoored, tmp_path, [natural(backdoored)], latent_strength=0.6)
    assert trainer._latent is None
    assert "`latent_strength` is ignored: No module of `ViTModel` gives the hidden state" in caplog.text
