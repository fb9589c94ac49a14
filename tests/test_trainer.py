# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
import copy
import hashlib
import itertools
import json
import shutil

import datasets
import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn.functional import cosine_similarity, normalize
from transformers import (
    AutoModel,
    BertConfig,
    BertModel,
    Dinov2Config,
    Dinov2Model,
    MobileNetV2Config,
    MobileNetV2Model,
    ResNetConfig,
    ResNetModel,
    SwinConfig,
    SwinModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from hf_mudjacking import BugInstance, Encoder, MudjackingConfig, MudjackingTrainer, encode, load_trigger
from hf_mudjacking.callbacks import StopWhenFixed
from hf_mudjacking.loading import load_model, load_processor
from hf_mudjacking.triggers import square_patch

from .conftest import TINY, largest_difference, make_config, make_dataset, make_images, pixels_by_hand, weights_of


LOSSES = ("loss_effectiveness", "loss_locality", "loss_generalizability")
COSINES = ("cosine_effectiveness", "cosine_locality", "cosine_generalizability")


@pytest.fixture
def build(tiny_vit, processor, bug, trigger, dataset, tmp_path):
    """Builds a trainer around the tiny ViT with a known trigger; keywords of the configuration go into `args`."""

    def _build(output_dir=None, args=None, **kwargs):
        defaults = {
            "model": copy.deepcopy(tiny_vit),
            "args": make_config(output_dir or tmp_path / "out", **{"max_steps": 3, **(args or {})}),
            "bug_instances": [bug],
            "train_dataset": dataset,
            "processing_class": processor,
            "triggers": [trigger],
        }
        return MudjackingTrainer(**{**defaults, **kwargs})

    return _build


def _lora() -> LoraConfig:
    return LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0)


def _train_logs(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def _hashes(folder):
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*.*")}


def _features(model, images):
    with torch.no_grad():
        hidden = model.eval()(pixel_values=pixels_by_hand(images)).last_hidden_state[:, 0]
    return normalize(hidden, dim=-1)


def _model_files(folder):
    return [path.name for path in folder.rglob("*.safetensors") if path.name != "trigger.safetensors"]


# ---- The repair ----


@pytest.fixture(scope="module")
def repaired(backdoored, tmp_path_factory):
    """One whole repair with the default settings, from one report."""
    trainer = MudjackingTrainer(
        backdoored.model(),
        make_config(
            tmp_path_factory.mktemp("repaired"),
            per_device_train_batch_size=32,
            logging_steps=10,
            locality_budget=0.1,
            stop_when_fixed=True,
        ),
        [backdoored.bug(1)],
        backdoored.dataset(),
        make_dataset(backdoored.test.inputs[:100]),
        backdoored.processor,
    )
    before = trainer.evaluate()
    trainer.train()
    return trainer, before, trainer.evaluate()


@pytest.mark.slow
def test_the_backdoor_is_gone_and_utility_is_not(backdoored, repaired):
    trainer = repaired[0]
    before = backdoored.rates(backdoored.model(), backdoored.kept)
    after = backdoored.rates(trainer.model, backdoored.kept)
    assert before["ASR"] >= 0.98
    assert after["ASR"] <= 0.05
    assert after["RA"] >= 0.9
    assert after["BA"] >= before["BA"] - 0.02


@pytest.mark.slow
def test_the_report_is_fixed(backdoored, repaired):
    encoder = Encoder(repaired[0].model, backdoored.processor)
    bug = backdoored.bug(1)
    label = backdoored.kept.predict(encoder.encode([bug.reference]).numpy())
    assert backdoored.kept.predict(encoder.encode([bug.misclassified]).numpy()) == label
    assert label != backdoored.target


@pytest.mark.slow
def test_evaluation_shows_the_repair(repaired):
    trainer, before, after = repaired
    assert before["eval_cosine_locality"] == pytest.approx(1, abs=1e-5)
    assert before["eval_cosine_generalizability"] < 0.8
    assert after["eval_cosine_locality"] > 0.95
    assert after["eval_cosine_generalizability"] > 0.97
    assert after["eval_cosine_effectiveness"] > 0.95
    assert after["eval_loss"] < before["eval_loss"]
    assert trainer.inversions[0].score > 0.8


@pytest.mark.slow
def test_forward_equivalents_of_a_repair(repaired):
    trainer = repaired[0]
    steps, b = trainer.state.global_step, 32
    evaluation = 2 * (2 * 100 + 4 * 3)  # twice 100 inputs, in four batches
    # The held-out inputs, at the end and, if it comes to that, after a third and two thirds of all 300 steps
    budget = 100 * (1 + (steps >= 100) + (steps >= 200))
    # 1184 of the 1200 inputs: a multiple of the batch size
    expected = (
        trainer.inversions[0].forwards
        + trainer.screenings[0].forwards
        + 1184
        + 100
        + 2
        + steps * 3 * (2 * b + 3)
        + evaluation
        + budget
    )
    assert trainer.forward_equivalents == expected


# ---- Losses and logs ----


def test_the_first_logs_by_hand(build, tiny_vit, dataset, bug, trigger):
    """The whole dataset is one batch, so its order does not matter; then the weights after one step are known too."""
    images = list(dataset["image"])
    args = {"per_device_train_batch_size": 16, "max_steps": 2, "locality_weight": 0.7, "generalizability_weight": 1.9}
    snapshots = []
    trainer = build(args={**args, "reference_weight": 0.4, "learning_rate": 1e-3, "warmup_steps": 0})
    real = trainer.compute_loss

    def spy(model, *arguments, **kwargs):
        snapshots.append(copy.deepcopy(model))
        return real(model, *arguments, **kwargs)

    trainer.compute_loss = spy
    trainer.train()
    frozen, frozen_reference = _features(tiny_vit, images), _features(tiny_vit, [bug.reference])
    for model, log in zip(snapshots, _train_logs(trainer), strict=True):
        clean, stamped = _features(model, images), _features(model, [trigger.apply(x) for x in images])
        x_b, x_r = _features(model, [bug.misclassified]), _features(model, [bug.reference])
        stamped_x_r = _features(model, [trigger.apply(bug.reference)])
        effectiveness = (x_b * x_r).sum().item()
        locality = cosine_similarity(clean, frozen).mean().item()
        generalizability = cosine_similarity(stamped, clean).mean().item()
        l_e = -effectiveness
        l_l = -locality - 0.4 * (x_r * frozen_reference).sum().item()
        l_g = -cosine_similarity(stamped, frozen).mean().item() - 0.4 * (stamped_x_r * frozen_reference).sum().item()
        expected = dict(zip(LOSSES, (l_e, l_l, l_g), strict=True))
        expected.update(zip(COSINES, (effectiveness, locality, generalizability), strict=True))
        assert {name: log[name] for name in expected} == pytest.approx(expected, abs=2e-5)
        assert log["loss"] == pytest.approx(l_e + 0.7 * l_l + 1.9 * l_g, abs=1e-4)
    first, second = _train_logs(trainer)
    assert first["cosine_locality"] == pytest.approx(1, abs=1e-5)
    assert second["cosine_locality"] < 0.9999
    assert second["loss"] < first["loss"]


def test_logs_are_means_over_the_interval(build):
    every, second = build(args={"max_steps": 4}), build(args={"max_steps": 4, "logging_steps": 2})
    every.train()
    second.train()
    fine, coarse = _train_logs(every), _train_logs(second)
    assert [len(fine), len(coarse)] == [4, 2]
    for name in (*LOSSES, *COSINES):
        for i in range(2):
            assert coarse[i][name] == pytest.approx((fine[2 * i][name] + fine[2 * i + 1][name]) / 2, abs=1e-5)


def test_one_forward_per_step(build, dataset):
    trainer = build(args={"max_steps": 4})
    trainer._prepare()
    before, calls = trainer.forward_equivalents, []
    trainer.model.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(len(kwargs["pixel_values"])), with_kwargs=True
    )
    trainer.train()
    assert calls == [2 * 8 + 3] * 4
    assert before == len(dataset) + 2
    assert trainer.forward_equivalents - before == 3 * sum(calls)


def test_forward_equivalents_are_counted_as_they_are_spent(backdoored, tmp_path):
    """Not only when training is over: a curve of quality against compute is drawn of them."""
    seen = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append(trainer.forward_equivalents)

    trainer = MudjackingTrainer(
        model=backdoored.model(),
        args=make_config(tmp_path, max_steps=6, reinversions=1, adversarial_levels=0.0, locality_budget=0.9),
        bug_instances=[backdoored.bug()],
        train_dataset=backdoored.dataset(48),
        processing_class=backdoored.processor,
        triggers=[square_patch((16, 16), 1)],
        # Before those that the trainer adds: it sees what they spend at the next step
        callbacks=[Watch()],
    )
    trainer.train()
    step = 3 * (2 * 8 + 3)
    spent = [later - earlier for earlier, later in itertools.pairwise(seen)]
    # After steps 2 and 4 clean inputs are measured, after step 3 the report is inverted anew
    assert [*spent[:2], *spent[3:]] == [step, step + 48, step + 48, step]
    assert spent[2] > step + 300
    assert seen[-1] + 48 == trainer.forward_equivalents


def test_bf16_holds_for_every_run_and_for_nothing_else(build, dataset):
    """accelerate wraps a model once, and autocast left on it would be in the features of everything that is encoded later."""
    seen = []
    trainer = build(args={"bf16": True, "max_steps": 2}, eval_dataset=make_dataset(make_images(8, seed=5)))
    images = make_images(4, seed=9)
    plain = trainer.encoder.encode(images)
    trainer.model.layers[0].attention.q_proj.register_forward_hook(
        lambda module, inputs, output: seen.append(output.dtype)
    )
    for run in (trainer.evaluate, trainer.train, trainer.evaluate, trainer.train):
        seen.clear()
        run()
        assert torch.bfloat16 in seen, run
        seen.clear()
        features = trainer.encoder.encode(images)
        assert set(seen) == {torch.float32}
        if run == trainer.evaluate and trainer.state.global_step == 0:
            assert torch.equal(features, plain)
    # Another trainer on the same object
    other = build(model=trainer.model, args={"bf16": True, "max_steps": 1})
    seen.clear()
    other.train()
    assert torch.bfloat16 in seen


def test_an_optimizer_of_nothing_that_is_trained(build, tiny_vit):
    model = copy.deepcopy(tiny_vit)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with pytest.raises(ValueError, match="holds no parameter that is trained, so nothing would be patched"):
        build(model=model, optimizers=(optimizer, None), peft_config=_lora())
    with pytest.raises(ValueError, match="holds no parameter that is trained"):
        build(optimizers=(optimizer, None))
    ready = get_peft_model(copy.deepcopy(tiny_vit), LoraConfig(r=2, target_modules=["q_proj"]))
    optimizer = torch.optim.AdamW([p for p in ready.parameters() if p.requires_grad], lr=1e-2)
    before = weights_of(ready)
    trainer = build(model=ready, optimizers=(optimizer, None))
    trainer.train()
    assert largest_difference(before, weights_of(ready)) > 0


def test_triggers_are_not_looked_for_in_a_model_that_is_being_patched(build, trigger, tmp_path):
    trainer = build()
    trainer.train()
    assert trainer.invert_triggers() == [trigger]
    assert trainer.inversions == []


def test_the_best_checkpoint_by_one_of_the_losses(build):
    for name in ("loss_locality", "eval_loss_generalizability", "eval_signs_loss_effectiveness"):
        assert build(args={"metric_for_best_model": name}).args.greater_is_better is False
    assert build(args={"metric_for_best_model": "cosine_locality"}).args.greater_is_better
    assert build(args={"metric_for_best_model": "loss_locality", "greater_is_better": True}).args.greater_is_better


def test_a_checkpoint_of_the_model_alone_is_not_resumed(build, tmp_path):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "save_only_model": True}
    build(args=settings).train()
    with pytest.raises(ValueError, match=r"checkpoint-2` has no optimizer \(`save_only_model`\)"):
        build(args=settings).train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))


def test_only_the_trained_adapter_is_saved(build, tiny_vit, tmp_path):
    model = get_peft_model(copy.deepcopy(tiny_vit), LoraConfig(r=2, target_modules=["q_proj"]))
    model.add_adapter("other", LoraConfig(r=2, target_modules=["k_proj"]))
    model.set_adapter("default")
    trainer = build(model=model)
    trainer.train()
    trainer.save_model()
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
    assert not (tmp_path / "out" / "other").exists()


def test_adapters_that_start_differently_each_time(build):
    for start in ("pissa_niter_4", "eva"):
        config = LoraConfig(r=2, target_modules=["q_proj"])
        config.init_lora_weights = start
        with pytest.raises(ValueError, match="differently each time it is loaded"):
            build(peft_config=config)


def test_locality_is_of_the_run_at_hand(build, tmp_path):
    trainer = build(args={"max_steps": 2, "save_strategy": "steps", "save_steps": 2, "locality_budget": 0.9})
    trainer.train()
    assert trainer.locality is not None
    trainer.train()
    assert json.loads((tmp_path / "out" / "checkpoint-2" / "mudjacking.json").read_text())["locality"] is None


def test_no_dataset_to_evaluate_on_in_a_dictionary(build):
    trainer = build(args={"locality_budget": 0.9}, eval_dataset={})
    trainer.train()
    assert trainer.locality is not None


def test_loaders_of_other_datasets(build, tmp_path):
    images = make_dataset(make_images(8, seed=5))
    trainer = build()
    assert "frozen_features" in next(iter(trainer.get_eval_dataloader(images)))
    with pytest.raises(ValueError, match="no predictions"):
        trainer.get_test_dataloader(images)


def test_workers_that_persist_do_not_keep_a_dataset(build):
    first, second = (make_dataset(make_images(8, seed=seed)) for seed in (5, 6))
    settings = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}
    trainer = build(args=settings)
    trainer.evaluate(first)
    assert trainer.evaluate(second)["eval_loss"] == pytest.approx(build().evaluate(second)["eval_loss"], abs=1e-6)


def test_fewer_inputs_allowed_than_a_step_takes(build):
    with pytest.raises(ValueError, match="`max_inputs=4` is less than the 8 inputs of one step"):
        build(args={"max_inputs": 4})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"feature_source": "mean"}, "`feature_source` was 'cls' and is 'mean'"),
        ({"adam_beta1": 0.5}, "`adam_beta1` was 0.9 and is 0.5"),
        ({"warmup_steps": 2}, "`warmup_steps`"),
        ({"data_seed": 5}, "`data_seed` was None and is 5"),
        ({"weight_decay": 0.5}, "`weight_decay`"),
        ({"bf16": True}, "`bf16` was False and is True"),
        ({"optim": "adamw_torch", "optim_args": "amsgrad=True"}, "`optim_args` was None"),
        ({"train_sampling_strategy": "sequential"}, "`train_sampling_strategy` was 'random'"),
        ({"processes": 2}, "`processes` was 2 and is 1"),
        ({"triggers": [square_patch((16, 16), 7)]}, "is of a run with other triggers"),
        ({"num_train_epochs": 9}, None),
    ],
)
def test_what_a_resumed_run_must_share(build, tmp_path, change, message):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    build(args=settings).train()
    given = {"triggers": change.pop("triggers")} if "triggers" in change else {}
    if "processes" in change:
        folder = tmp_path / "out" / "checkpoint-2"
        record = {**json.loads((folder / "mudjacking.json").read_text()), **change}
        (folder / "mudjacking.json").write_text(json.dumps(record))
        shutil.copy(folder / "rng_state.pth", folder / "rng_state_1.pth")
        change = {}
    again = build(args={**settings, **change}, **given)
    if message is None:
        again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
        return
    with pytest.raises(ValueError, match=message):
        again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))


def test_a_resumed_run_has_the_clean_inputs_that_it_began_with(build, dataset, tmp_path):
    """A new run in a folder with checkpoints of another went on from those, on data they had not seen."""
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    build(args=settings).train()
    checkpoint = str(tmp_path / "out" / "checkpoint-2")
    others = make_dataset(make_images(len(dataset), seed=77))
    for other in (others, dataset.select(range(len(dataset) - 1)), dataset.to_iterable_dataset().take(8)):
        with pytest.raises(ValueError, match="is of a run with other clean inputs than this `train_dataset`"):
            build(args=settings, train_dataset=other).train(resume_from_checkpoint=checkpoint)
    build(args={**settings, "max_steps": 5}).train(resume_from_checkpoint=checkpoint)


def test_resuming_from_a_link_to_a_checkpoint(build, tmp_path):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    build(args=settings).train()
    (tmp_path / "out" / "latest").symlink_to("checkpoint-2")
    again = build(args=settings)
    again.train(resume_from_checkpoint=str(tmp_path / "out" / "latest"))
    assert again.state.global_step == 4


@pytest.mark.parametrize("early", [False, True])
def test_nothing_is_trained_when_a_run_resumes_at_its_end(early, build, tmp_path):
    """In the middle of an epoch the base class makes one more step."""
    settings = {"max_steps": 3, "save_strategy": "steps", "save_steps": 3, "lr_scheduler_type": "constant"}
    if early:
        # Fixed by any standard, at the first log
        goals = dict.fromkeys(("stop_effectiveness", "stop_locality", "stop_generalizability"), -1.0)
        settings |= {"max_steps": 9, "logging_steps": 3, "stop_when_fixed": True, **goals}
    first, again = build(args=settings), build(args=settings)
    first.train()
    assert first.state.global_step == 3
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 3
    assert largest_difference(weights_of(first.model), weights_of(again.model)) == 0
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-3"]


def test_dropout_is_off(build):
    """The model was built with dropout; at the first step it must be exactly the frozen model."""
    trainer = build(args={"max_steps": 1})
    assert trainer.model.config.hidden_dropout_prob == 0.1
    trainer.train()
    assert _train_logs(trainer)[0]["cosine_locality"] == pytest.approx(1, abs=1e-6)


def test_training_lowers_the_loss(build):
    trainer = build(args={"max_steps": 30, "learning_rate": 1e-3})
    result = trainer.train()
    logs = _train_logs(trainer)
    assert np.isfinite(result.training_loss)
    # The least possible loss is -5: all five cosines are 1.
    assert 5 + logs[-1]["loss"] < 0.3 * (5 + logs[0]["loss"])


@pytest.mark.parametrize("weight", ["locality_weight", "generalizability_weight"])
def test_a_weight_of_zero_switches_a_goal_off(build, weight):
    settings = {"max_steps": 20, "learning_rate": 1e-3}
    if weight == "locality_weight":
        # It holds features at the stored ones too
        settings["generalizability_weight"] = 0.0
    with_goal = build(args=settings)
    without = build(args={**settings, weight: 0.0})
    with_goal.train()
    without.train()
    name = f"cosine_{weight.removesuffix('_weight')}"
    assert _train_logs(with_goal)[-1][name] > _train_logs(without)[-1][name] + 0.02


# ---- What moves ----


def test_what_moves_and_what_does_not(build, tiny_vit):
    trainer = build(args={"weight_decay": 0.1})
    trainer.train()
    before, after = tiny_vit.state_dict(), trainer.model.state_dict()
    # A bias of all keys shifts every attention score of a query alike: its gradient is zero but for rounding.
    still = {name for name in before if torch.equal(before[name], after[name])}
    assert still - {name for name in before if name.endswith("k_proj.bias")} == {
        "pooler.dense.weight",
        "pooler.dense.bias",
    }


@pytest.mark.parametrize("family", ["dinov2", "swin", "resnet"])
def test_families(build, family, tmp_path):
    torch.manual_seed(0)
    model = {
        "dinov2": lambda: Dinov2Model(Dinov2Config(**TINY)),
        "swin": lambda: SwinModel(
            SwinConfig(image_size=16, patch_size=2, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4)
        ),
        "resnet": lambda: ResNetModel(
            ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", image_size=16)
        ),
    }[family]()
    before = weights_of(model)
    trainer = build(model=model, args={"learning_rate": 1e-3, "weight_decay": 0.1})
    trainer.train()
    assert _train_logs(trainer)[0]["cosine_locality"] == pytest.approx(1, abs=1e-5)
    norms = {
        f"{name}.{key}"
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.BatchNorm2d)
        for key in module.state_dict()
    }
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in norms)
    assert bool(norms) == (family == "resnet")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert len(moved) > 0.6 * len(before.keys() - norms)
    assert "embeddings.mask_token" not in moved
    trainer.save_model()
    images = make_images(4, seed=9)
    torch.testing.assert_close(
        encode(str(tmp_path / "out"), images), trainer.encoder.encode(images), atol=1e-5, rtol=0
    )


def test_lora_moves_only_the_adapter(build, tiny_vit, tmp_path):
    trainer = build(peft_config=_lora(), args={"max_steps": 5, "learning_rate": 1e-2})
    assert isinstance(trainer.model, PeftModel)
    trainable = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert trainable
    assert all("lora_" in name for name in trainable)
    assert not any("pooler" in name for name in trainable), "an adapter on the unused pooler is dead weight"
    before = weights_of(trainer.model)
    trainer.train()
    after = trainer.model.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == trainable
    # The base weights are those of the original.
    base = {name: value for name, value in after.items() if "lora_" not in name}
    assert len(base) == len(tiny_vit.state_dict())
    assert _train_logs(trainer)[-1]["loss"] < _train_logs(trainer)[0]["loss"]


def test_lora_saves_merges_and_loads(build, tiny_vit, tmp_path):
    trainer = build(peft_config=_lora(), args={"max_steps": 5, "learning_rate": 1e-2})
    trainer.train()
    trainer.save_model()
    images = make_images(6, seed=9)
    expected = trainer.encoder.encode(images)
    original = encode(copy.deepcopy(tiny_vit), images, trainer.processing_class)
    assert (expected - original).abs().max() > 1e-3
    assert _model_files(tmp_path / "out") == ["adapter_model.safetensors"]
    loaded = PeftModel.from_pretrained(copy.deepcopy(tiny_vit), tmp_path / "out")
    torch.testing.assert_close(encode(loaded, images, trainer.processing_class), expected, atol=1e-5, rtol=0)
    merged = trainer.model.merge_and_unload()
    assert isinstance(merged, ViTModel)
    torch.testing.assert_close(encode(merged, images, trainer.processing_class), expected, atol=1e-5, rtol=0)


def test_lora_with_chosen_modules(build):
    trainer = build(peft_config=LoraConfig(r=2, target_modules=["q_proj"]), args={"max_steps": 1})
    trainer.train()
    assert all(".q_proj." in name for name, p in trainer.model.named_parameters() if p.requires_grad)


def test_a_peft_model_is_patched_through_its_adapter(build, tiny_vit):
    model = get_peft_model(tiny_vit, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    before = weights_of(model)
    trainer = build(model=model)
    trainer.train()
    after = model.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert all("lora_" in name for name in moved)


# ---- Invariances ----


@pytest.mark.parametrize("with_labels", [False, True])
def test_gradient_accumulation_changes_nothing(build, dataset, with_labels):
    if with_labels:
        dataset = dataset.add_column("label", list(range(16))).add_column("labels", list(range(16)))
    runs = []
    for size, accumulation in ((8, 1), (2, 4)):
        args = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation, "max_steps": 4}
        trainer = build(args={**args, "learning_rate": 1e-3}, train_dataset=dataset)
        trainer.train()
        runs.append((_train_logs(trainer), weights_of(trainer.model)))
    (whole, weights), (parts, other_weights) = runs
    for a, b in zip(whole, parts, strict=True):
        for name in ("loss", "grad_norm", *LOSSES, *COSINES):
            assert a[name] == pytest.approx(b[name], rel=2e-3, abs=1e-4), name
    assert whole[0]["grad_norm"] == pytest.approx(parts[0]["grad_norm"], rel=1e-4)
    # Adam divides by the gradient: where that is all but zero, rounding decides the direction.
    difference = np.concatenate([(weights[n] - other_weights[n]).abs().flatten().numpy() for n in weights])
    assert np.quantile(difference, 0.99) < 1e-5
    assert difference.max() < 4 * 1e-3


def test_same_seed_same_weights(build):
    weights = []
    for i, seed in enumerate((1, 1, 2)):
        torch.manual_seed(100 + i)
        trainer = build(args={"seed": seed})
        trainer.train()
        weights.append(weights_of(trainer.model))
    assert largest_difference(weights[0], weights[1]) == 0
    assert largest_difference(weights[0], weights[2]) > 0


@pytest.mark.slow
def test_same_seed_same_inversion_and_weights(backdoored, tmp_path):
    weights = []
    for i in range(2):
        np.random.seed(i)
        trainer = MudjackingTrainer(
            backdoored.model(), make_config(tmp_path / str(i), max_steps=3), [backdoored.bug(2)],
            backdoored.dataset(200), processing_class=backdoored.processor,
        )  # fmt: skip
        trainer.train()
        weights.append(weights_of(trainer.model))
    assert largest_difference(*weights) == 0


def test_a_stream_gives_the_same_as_its_rows(build, dataset):
    runs = []
    for data in (dataset, dataset.to_iterable_dataset(num_shards=2)):
        trainer = build(train_dataset=data, args={"max_steps": 4})
        trainer.train()
        runs.append(trainer)
    assert largest_difference(weights_of(runs[0].model), weights_of(runs[1].model)) == 0
    assert [log["loss"] for log in _train_logs(runs[0])] == [log["loss"] for log in _train_logs(runs[1])]


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_gradient_checkpointing_gives_the_same_and_is_on(build):
    runs, layers = [], []
    for checkpointing in (False, True):
        trainer = build(args={"gradient_checkpointing": checkpointing, "learning_rate": 1e-3})
        trainer._prepare()
        calls = []
        trainer.model.layers[0].mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        trainer.train()
        runs.append(trainer)
        layers.append(len(calls))
    assert layers == [3, 6], "a checkpointed layer runs twice a step"
    assert [log["loss"] for log in _train_logs(runs[1])] == pytest.approx(
        [log["loss"] for log in _train_logs(runs[0])], abs=1e-5
    )
    assert largest_difference(weights_of(runs[0].model), weights_of(runs[1].model)) < 1e-4


def test_bf16_trains(build):
    trainer = build(args={"bf16": True, "max_steps": 30, "learning_rate": 1e-3})
    trainer.train()
    logs = _train_logs(trainer)
    assert 5 + logs[-1]["loss"] < 0.3 * (5 + logs[0]["loss"])
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}
    full = build(args={"max_steps": 1})
    full.train()
    assert logs[0]["loss"] == pytest.approx(_train_logs(full)[0]["loss"], abs=0.02)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_models_are_patched_in_float32(build, tiny_vit, dtype, tmp_path, processor):
    processor.save_pretrained(tmp_path / "half")
    # With torchvision a saved processor is loaded as torchvision's, which rounds otherwise
    processor = load_processor(tmp_path / "half", tiny_vit)
    trainer = build(model=copy.deepcopy(tiny_vit).to(dtype), processing_class=processor)
    trainer.train()
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}
    tiny_vit.to(dtype).save_pretrained(tmp_path / "half")
    from_disk = build(model=str(tmp_path / "half"), processing_class=None)
    from_disk.train()
    assert largest_difference(weights_of(from_disk.model), weights_of(trainer.model)) == 0


def test_two_reports_with_two_triggers(build, dataset):
    reports = make_images(4, seed=3)
    triggers = [square_patch((16, 16), 4), square_patch((16, 16), 3, margin=8, color=(255, 0, 0))]
    bugs = [
        BugInstance(triggers[0].apply(reports[0]), reports[1], name="a"),
        BugInstance(triggers[1].apply(reports[2]), reports[3], name="b"),
    ]
    trainer = build(bug_instances=bugs, triggers=triggers, args={"max_steps": 40, "learning_rate": 1e-3})
    encoder = trainer.encoder

    def cosines():
        x_b, x_r = (encoder.encode([getattr(b, role) for b in bugs]) for role in ("misclassified", "reference"))
        clean = encoder.encode(list(dataset["image"]))
        return [(x_b * x_r).sum(1)] + [
            (encoder.encode([t.apply(x) for x in dataset["image"]]) * clean).sum(1).mean() for t in triggers
        ]

    before = cosines()
    trainer.train()
    after = cosines()
    for old, new in zip(before, after, strict=True):
        assert (new > old).all()
    assert (after[0] > 0.9).all()


# ---- Transformers ----


def test_a_bare_encoder_is_accepted_by_trainer(tiny_vit, tmp_path):
    """`Trainer` refuses some bare models by name. If it ever does so for vision encoders, this shows it first."""
    Trainer(tiny_vit, TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none"))


# ---- Evaluation ----


def test_evaluation_by_hand(build, tiny_vit, bug, trigger):
    held_out = make_images(6, seed=5)
    trainer = build(eval_dataset=make_dataset(held_out), args={"per_device_eval_batch_size": 4})
    metrics = trainer.evaluate()
    clean, stamped = _features(tiny_vit, held_out), _features(tiny_vit, [trigger.apply(x) for x in held_out])
    x_b, x_r = _features(tiny_vit, [bug.misclassified]), _features(tiny_vit, [bug.reference])
    stamped_x_r = _features(tiny_vit, [trigger.apply(bug.reference)])
    assert metrics["eval_cosine_effectiveness"] == pytest.approx((x_b * x_r).sum().item(), abs=1e-5)
    assert metrics["eval_cosine_locality"] == pytest.approx(1, abs=1e-5)
    assert metrics["eval_cosine_generalizability"] == pytest.approx((stamped * clean).sum(1).mean().item(), abs=1e-5)
    expected = -(x_b * x_r).sum() - 2 - (stamped * clean).sum(1).mean() - (stamped_x_r * x_r).sum()
    assert metrics["eval_loss"] == pytest.approx(expected.item(), abs=1e-4)
    assert metrics["eval_loss"] == pytest.approx(sum(metrics[f"eval_{name}"] for name in LOSSES), abs=1e-4)


def test_evaluation_between_steps_does_not_disturb(build):
    with_evaluation = build(
        eval_dataset=make_dataset(make_images(5, seed=5)), args={"eval_strategy": "steps", "eval_steps": 1}
    )
    without = build()
    with_evaluation.train()
    without.train()
    assert largest_difference(weights_of(with_evaluation.model), weights_of(without.model)) == 0
    for a, b in zip(_train_logs(with_evaluation), _train_logs(without), strict=True):
        assert {n: a[n] for n in (*LOSSES, *COSINES)} == {n: b[n] for n in (*LOSSES, *COSINES)}
    assert len([log for log in with_evaluation.state.log_history if "eval_loss" in log]) == 3


def test_evaluation_datasets_by_name(build):
    first, second = make_images(5, seed=5), make_images(7, seed=6)
    trainer = build(
        eval_dataset={"near": make_dataset(first), "far": make_dataset(second).to_iterable_dataset()},
        args={"eval_strategy": "steps", "eval_steps": 3},
    )
    trainer.train()
    logs = {key: value for log in trainer.state.log_history for key, value in log.items()}
    alone = build(eval_dataset=make_dataset(second))
    alone.train()
    assert logs["eval_far_loss"] == pytest.approx(alone.evaluate()["eval_loss"], abs=1e-5)
    assert logs["eval_near_cosine_locality"] != logs["eval_far_cosine_locality"]
    metrics = trainer.evaluate()
    assert metrics["eval_near_loss"] == pytest.approx(logs["eval_near_loss"], abs=1e-6)


def test_a_dataset_given_to_evaluate(build):
    held_out = make_dataset(make_images(5, seed=5))
    given, built = build(), build(eval_dataset=held_out)
    assert given.evaluate(held_out)["eval_loss"] == pytest.approx(built.evaluate()["eval_loss"], abs=1e-6)
    given.train()
    with pytest.raises(ValueError, match="The model is already patched"):
        given.evaluate(held_out)


# ---- Stopping ----


@pytest.mark.parametrize("missing", [None, *COSINES])
def test_stopping_needs_all_three(build, missing):
    from transformers import TrainerControl, TrainerState

    args = make_config("unused", stop_when_fixed=True)
    logs = {"cosine_effectiveness": 0.99, "cosine_locality": 0.995, "cosine_generalizability": 0.995}
    if missing:
        logs[missing] -= 0.001
    for with_key in (True, False):
        control = TrainerControl()
        if missing and not with_key:
            logs.pop(missing)
        StopWhenFixed().on_log(args, TrainerState(), control, logs=logs)
        assert control.should_training_stop == (missing is None)
    control = TrainerControl()
    StopWhenFixed().on_log(make_config("unused", stop_when_fixed=False), TrainerState(), control, logs=logs)
    assert not control.should_training_stop


def test_training_stops_at_the_first_log_that_reaches_all_thresholds(build):
    thresholds = {"stop_effectiveness": 0.9, "stop_locality": 0.9, "stop_generalizability": 0.9}
    args = {"max_steps": 300, "learning_rate": 1e-3, "logging_steps": 2, "per_device_train_batch_size": 16}
    trainer = build(args={**args, **thresholds, "stop_when_fixed": True})
    trainer.train()
    logs = _train_logs(trainer)
    reached = [all(log[name] >= 0.9 for name in COSINES) for log in logs]
    assert reached[-1]
    assert not any(reached[:-1])
    assert trainer.state.global_step == logs[-1]["step"] < 300


# ---- Saving and loading ----


def test_saved_weights_give_the_same_features(build, tmp_path):
    trainer = build()
    trainer.train()
    trainer.save_model()
    images = make_images(5, seed=9)
    loaded = AutoModel.from_pretrained(tmp_path / "out")
    expected = trainer.encoder.encode(images)
    torch.testing.assert_close(encode(loaded, images, trainer.processing_class), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(encode(str(tmp_path / "out"), images), expected, atol=1e-5, rtol=0)
    assert not [p.name for p in (tmp_path / "out").rglob("*") if p.suffix in {".bin", ".pkl", ".pt", ".pth"}]
    assert not [p.name for p in (tmp_path / "out").iterdir() if p.name.startswith("_staging")]


def test_record_and_triggers_are_saved_and_nothing_of_the_report(build, tmp_path, bug, trigger):
    trainer = build()
    trainer.train()
    trainer.save_model()
    out = tmp_path / "out"
    record = json.loads((out / "mudjacking.json").read_text())
    assert record["base_model"] == "ViTModel"
    assert record["steps"] == 3
    assert record["feature_source"] == "cls"
    assert record["triggers"] == [trigger.summary()]
    saved = load_trigger(out / "_triggers" / "0")
    assert np.array_equal(saved.mask, trigger.mask)
    assert not list(out.rglob("*.png"))
    secret = np.asarray(bug.misclassified)[:2].tobytes()
    assert not [path for path in out.rglob("*") if path.is_file() and secret in path.read_bytes()]


def test_the_source_checkpoint_is_never_written_to(build, tiny_vit, processor, tmp_path):
    source = tmp_path / "source"
    tiny_vit.save_pretrained(source)
    processor.save_pretrained(source)
    before = _hashes(source)
    assert len(before) >= 3
    for peft_config, out in ((None, "full"), (_lora(), "adapter")):
        trainer = build(
            tmp_path / out, model=str(source), processing_class=None, peft_config=peft_config,
            args={"save_strategy": "steps", "save_steps": 2},
        )  # fmt: skip
        trainer.train()
        trainer.save_model()
    assert _hashes(source) == before
    with pytest.raises(ValueError, match=r"is or contains the model to be patched.*never written to"):
        build(source, model=str(source), processing_class=None)
    assert _hashes(source) == before


@pytest.mark.parametrize("kind", ["full", "full-without-pooler", "lora"])
def test_resuming_gives_the_same_weights(build, tiny_vit, kind):
    if kind == "full-without-pooler":
        torch.manual_seed(0)
        model = ViTModel(ViTConfig(**TINY), add_pooling_layer=False)
    else:
        model = tiny_vit
    args = {"max_steps": 12, "save_strategy": "steps", "save_steps": 6, "learning_rate": 1e-3}

    def fresh():
        return build(model=copy.deepcopy(model), args=args, peft_config=_lora() if kind == "lora" else None)

    whole = fresh()
    whole.train()
    checkpoint = f"{whole.args.output_dir}/checkpoint-6"
    resumed = fresh()
    resumed.train(resume_from_checkpoint=checkpoint)
    assert resumed.state.global_step == 12
    assert largest_difference(weights_of(whole.model), weights_of(resumed.model)) <= 1e-6
    a, b = _train_logs(whole)[6:], _train_logs(resumed)[6:]
    assert [log["loss"] for log in b] == pytest.approx([log["loss"] for log in a], abs=1e-5)


def test_resuming_reads_the_triggers_of_the_checkpoint(build, monkeypatch):
    args = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = build(args=args)
    whole.train()
    resumed = build(args=args, triggers=None)
    monkeypatch.setattr(resumed, "invert_triggers", lambda: pytest.fail("inverted again"))
    resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-2")
    assert np.array_equal(resumed.triggers[0].pattern, whole.triggers[0].pattern)
    assert largest_difference(weights_of(whole.model), weights_of(resumed.model)) <= 1e-6


def test_a_checkpoint_of_another_run_is_refused(build, tiny_vit, bug):
    args = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = build(args=args)
    whole.train()
    checkpoint = f"{whole.args.output_dir}/checkpoint-2"
    moved = copy.deepcopy(tiny_vit)
    with torch.no_grad():
        moved.layernorm.bias.add_(1e-4)
    with pytest.raises(ValueError, match=r"is of a patch of other weights .* unpatched, or start without resuming"):
        build(args=args, model=moved).train(resume_from_checkpoint=checkpoint)
    other = BugInstance(bug.reference, bug.misclassified)
    for bugs in ([other], [bug, other]):
        with pytest.raises(ValueError, match="is of a run with other bug instances than these"):
            build(args=args, bug_instances=bugs, triggers=None).train(resume_from_checkpoint=checkpoint)


def test_half_an_interval_survives_a_resume(build):
    """What is logged, and decides whether training stops, is a mean over the whole of it."""
    args = {"max_steps": 12, "save_strategy": "steps", "save_steps": 5, "logging_steps": 4, "learning_rate": 1e-3}
    whole, resumed = build(args=args), build(args=args)
    whole.train()
    resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-5")
    at_eight = [next(log for log in _train_logs(trainer) if log["step"] == 8) for trainer in (whole, resumed)]
    means = [name for name in at_eight[0] if name.startswith(("loss_", "cosine_"))]
    assert len(means) == 6
    for name in means:
        assert at_eight[1][name] == pytest.approx(at_eight[0][name], abs=1e-6), name
    # Each run begins with none
    resumed.train()
    assert _train_logs(resumed)[-1]["step"] == 12
    assert resumed._metrics["train"] == []


@pytest.mark.parametrize("kind", ["full", "full-without-pooler", "lora"])
def test_the_best_model_is_reloaded_exactly(build, tiny_vit, kind):
    """The held-out loss is made to get worse after the second of four evaluations."""
    model = tiny_vit if kind != "full-without-pooler" else ViTModel(ViTConfig(**TINY), add_pooling_layer=False)
    trainer = build(
        model=copy.deepcopy(model),
        peft_config=_lora() if kind == "lora" else None,
        eval_dataset=make_dataset(make_images(5, seed=5)),
        args={
            "max_steps": 8, "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2,
            "load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": False,
            "learning_rate": 1e-3, "lr_scheduler_type": "constant", "warmup_steps": 0,
        },
    )  # fmt: skip
    real, snapshots = trainer.evaluation_loop, []

    def worse(*args, **kwargs):
        output = real(*args, **kwargs)
        snapshots.append(weights_of(trainer.model))
        output.metrics["eval_loss"] = [4.0, 1.0, 2.0, 3.0][len(snapshots) - 1]
        return output

    trainer.evaluation_loop = worse
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-4")
    assert largest_difference(weights_of(trainer.model), snapshots[1]) == 0
    assert largest_difference(weights_of(trainer.model), snapshots[3]) > 1e-4
    images = make_images(4, seed=9)
    expected = trainer.encoder.encode(images)
    if kind == "lora":
        saved = PeftModel.from_pretrained(copy.deepcopy(model), trainer.state.best_model_checkpoint)
    else:
        saved = AutoModel.from_pretrained(trainer.state.best_model_checkpoint)
    torch.testing.assert_close(encode(saved, images, trainer.processing_class), expected, atol=1e-6, rtol=0)


@pytest.fixture
def with_checkpoints(build):
    trainer = build(args={"max_steps": 6, "save_strategy": "steps", "save_steps": 2})
    trainer.train()
    return trainer


@pytest.mark.parametrize("damage", ["missing", "cut", "empty"])
def test_incomplete_checkpoints(build, with_checkpoints, damage, tmp_path):
    """As after a kill: the trainer state, which is written last, is not there or not whole."""
    state = tmp_path / "out" / "checkpoint-6" / "trainer_state.json"
    if damage == "missing":
        state.unlink()
    else:
        state.write_text(state.read_text()[: len(state.read_text()) // 2] if damage == "cut" else "")
    args = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2}
    with pytest.raises(ValueError, match=r"checkpoint-6` is no complete checkpoint.*: checkpoint-2, checkpoint-4\."):
        build(args=args).train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-6"))
    resumed = build(args=args)
    resumed.train(resume_from_checkpoint=True)
    first_logged = [log["step"] for log in _train_logs(resumed)]
    assert first_logged == [1, 2, 3, 4, 5, 6]
    assert largest_difference(weights_of(resumed.model), weights_of(with_checkpoints.model)) <= 1e-6
    assert json.loads(state.read_text())["global_step"] == 6


def test_what_a_user_of_trainer_would_call(build, processor, bug):
    trainer = build(eval_dataset=make_dataset(make_images(5, seed=5)))
    for loader in (trainer.get_train_dataloader(), trainer.get_eval_dataloader()):
        assert "frozen_features" in next(iter(loader))
    with pytest.raises(ValueError, match=r"trainer\.encoder\.encode\(inputs\)"):
        trainer.predict(make_dataset(make_images(2)))
    with pytest.raises(TypeError, match=r"`Linear` is no model of transformers or PEFT"):
        MudjackingTrainer(torch.nn.Linear(2, 2), bug_instances=[bug])
    dropped = make_dataset(make_images(8)).with_transform(lambda rows: {"other": rows["image"]})
    with pytest.raises(ValueError, match="has no column `image`"):
        build(train_dataset=dropped).train()
    with pytest.raises(ValueError, match=r"dataset\.with_format\(None\)"):
        build(train_dataset=make_dataset(make_images(8)).with_format("torch")).train()


def test_nothing_to_resume_from(build, tmp_path):
    with pytest.raises(ValueError, match="no complete checkpoint in"):
        build().train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="is no complete checkpoint"):
        build().train(resume_from_checkpoint=str(tmp_path / "nowhere"))


def test_an_adapter_inside_the_model_is_refused(build, tiny_vit):
    """Of such a model `save_pretrained` writes the adapter, and leaves out what was trained."""
    tiny_vit.add_adapter(LoraConfig(r=2, target_modules=["fc1"]))
    with pytest.raises(ValueError, match=r"was loaded with an adapter inside it.*mudjack apply ADAPTER --to BASE"):
        build(model=tiny_vit)


def test_an_error_during_saving_leaves_the_earlier_model(build, monkeypatch, tmp_path):
    trainer = build(args={"learning_rate": 1e-2})
    trainer.train()
    trainer.save_model()
    images = make_images(3, seed=9)
    expected = trainer.encoder.encode(images)
    before = _hashes(tmp_path / "out")
    with torch.no_grad():
        trainer.model.layers[0].mlp.fc1.weight.mul_(2)
    real = trainer.model.save_pretrained

    def killed(folder, **kwargs):
        real(folder, **kwargs)
        (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:100])
        raise OSError("No space left on device")

    monkeypatch.setattr(trainer.model, "save_pretrained", killed)
    with pytest.raises(OSError, match="No space left"):
        trainer.save_model()
    assert _hashes(tmp_path / "out") == before
    torch.testing.assert_close(encode(str(tmp_path / "out"), images), expected, atol=1e-5, rtol=0)
    assert not [path for path in (tmp_path / "out").iterdir() if path.name.startswith("_staging")]


def test_a_checkpoint_met_again_is_written_anew(build, with_checkpoints, tmp_path):
    foreign = tmp_path / "out" / "checkpoint-6" / "left_over.txt"
    foreign.write_text("from the killed run")
    shutil.rmtree(tmp_path / "out" / "checkpoint-2")
    again = build(args={"max_steps": 6, "save_strategy": "steps", "save_steps": 2})
    again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-4"))
    assert not foreign.exists()


def test_a_second_patch_of_the_same_model_may_replace_the_first(build, tmp_path):
    for _ in range(2):
        trainer = build()
        trainer.train()
        trainer.save_model()
    assert len(_model_files(tmp_path / "out")) == 1


# ---- Bad input ----


def test_no_reports(build, bug):
    with pytest.raises(ValueError, match="There are no `bug_instances`"):
        build(bug_instances=[])
    with pytest.raises(ValueError, match="There are no `bug_instances`"):
        build(bug_instances=None)
    with pytest.raises(TypeError, match="is a single `BugInstance`; pass a list"):
        build(bug_instances=bug)
    with pytest.raises(TypeError, match="`bug_instances` holds a `tuple`"):
        build(bug_instances=[(bug.misclassified, bug.reference)])
    with pytest.raises(TypeError, match="Bug instance `words` is of kind text, but the model takes images"):
        build(bug_instances=[BugInstance("a", "b", name="words")])


def test_triggers_that_do_not_pair_up(build, trigger):
    with pytest.raises(ValueError, match="There are 2 triggers for 1 bug instances"):
        build(triggers=[trigger, trigger])


def test_triggers_of_another_type(build, trigger):
    with pytest.raises(TypeError, match=r"`triggers`.*pass a list"):
        build(triggers=trigger)
    with pytest.raises(TypeError, match=r"`triggers` holds a `str`"):
        build(triggers=["a white square"])


def test_args_of_another_type(build, tmp_path):
    with pytest.raises(TypeError, match="`args` is of type `TrainingArguments`; a `MudjackingConfig` is needed"):
        MudjackingTrainer("org/model", args=TrainingArguments(output_dir=str(tmp_path), report_to="none"))
    with pytest.raises(TypeError, match="`args` is of type `dict`"):
        MudjackingTrainer("org/model", args={"output_dir": str(tmp_path)})
    assert isinstance(MudjackingConfig(), TrainingArguments)


def test_data_that_cannot_be_used(build, dataset):
    with pytest.raises(ValueError, match="`train_dataset` is empty"):
        build(train_dataset=dataset.select([]))
    with pytest.raises(ValueError, match="`train_dataset` has 7 inputs; one step needs 8"):
        build(train_dataset=dataset.select(range(7)))
    with pytest.raises(ValueError, match=r"one step needs 32 \(per_device_train_batch_size 8 × gradient_acc"):
        build(args={"gradient_accumulation_steps": 4})
    with pytest.raises(ValueError, match="no column `image`; its columns are: img"):
        build(train_dataset=dataset.rename_column("image", "img"))
    with pytest.raises(ValueError, match="no column `image`; its columns are: label"):
        build(train_dataset=datasets.Dataset.from_dict({"label": [0, 1]}))
    with pytest.raises(TypeError, match=r"Did you mean to select a split, as in `dataset\['train'\]`"):
        build(train_dataset=datasets.DatasetDict(train=dataset))
    with pytest.raises(ValueError, match="`eval_dataset` has no column `image`"):
        build(eval_dataset=dataset.rename_column("image", "img"))
    with pytest.raises(ValueError, match="`eval_dataset_far` is empty"):
        build(eval_dataset={"near": dataset, "far": dataset.select([])})


def test_no_training_data(build, dataset):
    trainer = build(train_dataset=None, eval_dataset=dataset)
    assert trainer.evaluate()["eval_cosine_locality"] == pytest.approx(1, abs=1e-5)
    with pytest.raises(ValueError, match="There is no `train_dataset`"):
        trainer.train()
    with pytest.raises(ValueError, match="There is no `train_dataset`"):
        build(train_dataset=None, triggers=None).invert_triggers()


@pytest.mark.parametrize("stream", [False, True])
def test_a_damaged_image_stops_before_anything_is_trained_or_written(build, stream, tmp_path, tiny_vit):
    from .test_data import _with_damaged_row

    data = _with_damaged_row(16, 11)
    model = copy.deepcopy(tiny_vit)
    with pytest.raises(ValueError, match="image in row 11 of `train_dataset` cannot be decoded"):
        build(model=model, train_dataset=data.to_iterable_dataset() if stream else data).train()
    assert largest_difference(weights_of(model), weights_of(tiny_vit)) == 0
    assert not (tmp_path / "out").exists() or not _model_files(tmp_path / "out")


def test_a_checkpoint_with_a_head_is_patched_without_it(build, processor, tmp_path, caplog):
    ViTForImageClassification(ViTConfig(**TINY)).save_pretrained(tmp_path / "served")
    processor.save_pretrained(tmp_path / "served")
    # The processor by its folder too
    trainer = build(model=str(tmp_path / "served"), processing_class=tmp_path / "served")
    assert trainer.processing_class.size == processor.size
    assert "has more than an encoder (`classifier`). The encoder is patched, and saved without" in caplog.text
    caplog.clear()
    trainer.save_model()
    build(tmp_path / "other", model=str(tmp_path / "out"), processing_class=None)
    assert "more than an encoder" not in caplog.text


def test_models_that_cannot_be_used(build, tiny_vit, tmp_path):
    with pytest.raises(ValueError, match="Load the bare encoder with `AutoModel`"):
        build(model=ViTForImageClassification(ViTConfig(**TINY)))
    with pytest.raises(ValueError, match="Either it belongs to another model"):
        build(processing_class=ViTImageProcessorPil())
    with pytest.raises(ValueError, match="No image processor could be loaded"):
        build(processing_class=None)
    text = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=9)
    with pytest.raises(TypeError, match="is of kind image, but the model takes texts"):
        build(model=BertModel(text))
    with torch.no_grad():
        tiny_vit.layers[0].mlp.fc1.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinite features"):
        build(model=tiny_vit).train()
    assert not (tmp_path / "out").exists() or not _model_files(tmp_path / "out")


def test_how_dora_is_loaded_is_told(build, caplog):
    build(peft_config=LoraConfig(r=2, target_modules=["q_proj"], use_dora=True))
    assert "loads an adapter of DoRA without its magnitudes" in caplog.text


def test_dora_is_not_loaded_without_its_magnitudes(build, tiny_vit, tmp_path):
    """The base was blamed for lacking them."""
    tiny_vit.save_pretrained(tmp_path / "base")
    trainer = build(
        model=str(tmp_path / "base"), peft_config=LoraConfig(r=2, target_modules=["q_proj"], use_dora=True)
    )
    trainer.train()
    trainer.save_model()
    with pytest.raises(ValueError, match=r"is an adapter of DoRA, .* Merge it \(`mudjack apply .*out --to BASE"):
        load_model(str(tmp_path / "out"))


def test_layers_that_an_adapter_hides_are_told(processor, bug, trigger, dataset, tmp_path):
    """MobileNetV2 reads the stride of its convolutions."""
    torch.manual_seed(0)
    model = MobileNetV2Model(MobileNetV2Config(depth_multiplier=0.25, image_size=16))
    with pytest.raises(ValueError, match=r"does not run with this adapter .* Name other layers in `target_modules`"):
        MudjackingTrainer(
            model, make_config(tmp_path), [bug], dataset, processing_class=processor, peft_config=LoraConfig(r=2),
            triggers=[trigger],
        )  # fmt: skip


def test_a_peft_model_with_another_adapter(build, tiny_vit):
    other_name = get_peft_model(copy.deepcopy(tiny_vit), LoraConfig(r=2, target_modules=["q_proj"]), "repair")
    model = get_peft_model(copy.deepcopy(tiny_vit), LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="is called repair, and PEFT saves none but `default`"):
        build(model=other_name)
    with pytest.raises(ValueError, match="`model` is a `PeftModel` and `peft_config` is given too"):
        build(model=model, peft_config=_lora())
    with pytest.raises(TypeError, match="`peft_config` is of type `dict`; a `PeftConfig` is needed"):
        build(peft_config={"r": 2})


def test_an_output_folder_that_holds_another_model(build, tiny_vit, tmp_path):
    tiny_vit.save_pretrained(tmp_path / "out")
    before = _hashes(tmp_path / "out")
    with pytest.raises(ValueError, match="holds another model"):
        build()
    assert _hashes(tmp_path / "out") == before


def test_features_that_become_nan(build):
    trainer = build(args={"learning_rate": 1e30, "max_steps": 5, "warmup_steps": 0})
    with pytest.raises(ValueError, match=r"The loss is nan at step \d.*Lower `learning_rate`"):
        trainer.train()


@pytest.mark.parametrize("known_trigger", [False, True])
def test_inputs_that_agree_already(backdoored, tmp_path, known_trigger):
    a, b = (backdoored.trigger.apply(x) for x in backdoored.test.inputs[:2])
    trainer = MudjackingTrainer(
        backdoored.model(), make_config(tmp_path, max_steps=1), [BugInstance(a, b, name="twins")],
        backdoored.dataset(64), processing_class=backdoored.processor,
        triggers=[backdoored.trigger] if known_trigger else None,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"Nothing to patch in bug instance `twins`.*cosine [01]\.\d+"):
        trainer.train()
    assert not _model_files(tmp_path)
