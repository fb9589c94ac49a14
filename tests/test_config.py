# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
import dataclasses

import pytest
from transformers import HfArgumentParser, TrainingArguments

from hf_mudjacking import MudjackingConfig

from .conftest import make_config


def _defaults(cls):
    return {field.name: field.default for field in dataclasses.fields(cls)}


def test_own_defaults():
    defaults = _defaults(MudjackingConfig)
    expected = {
        "locality_weight": 1.0,
        "generalizability_weight": 1.0,
        "reference_weight": 1.0,
        "feature_source": "auto",
        "max_inputs": 10_000,
        "inversion_inputs": 32,
        "max_trigger_area": 0.4,
        "min_evidence": 0.5,
        "on_unverified": "refuse",
        "remember_triggers": True,
        "adversarial_levels": None,
        "latent_strength": 0.6,
        "locality_budget": 0.1,
        "stop_when_fixed": True,
    }
    assert {name: defaults[name] for name in expected} == expected


def test_the_docstring_lists_every_changed_default():
    base, own = _defaults(TrainingArguments), _defaults(MudjackingConfig)
    changed = {name for name in base if base[name] != own[name]}
    assert changed == {
        "max_steps", "per_device_train_batch_size", "per_device_eval_batch_size", "learning_rate",
        "lr_scheduler_type", "warmup_steps", "logging_steps", "remove_unused_columns",
        "ddp_find_unused_parameters",
    }  # fmt: skip
    for name in changed:
        listed = [line for line in MudjackingConfig.__doc__.splitlines() if f"> - `{name}`" in line]
        assert len(listed) == 1, name
    for name in own.keys() - base.keys():
        assert name in MudjackingConfig.__doc__, name


def test_every_own_field_has_a_help_text():
    base = {field.name for field in dataclasses.fields(TrainingArguments)}
    assert all(field.metadata.get("help") for field in dataclasses.fields(MudjackingConfig) if field.name not in base)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("locality_weight", -0.1, "`locality_weight=-0.1` is no weight of a loss"),
        ("generalizability_weight", -1, "`generalizability_weight=-1` is no weight of a loss"),
        ("reference_weight", -1, "`reference_weight=-1` is no weight of a loss"),
        ("max_trigger_area", 1.5, "`max_trigger_area=1.5` is not a share"),
        ("max_trigger_area", 0, "`max_trigger_area=0` is not a share"),
        ("min_evidence", -2, "`min_evidence=-2` is out of reach"),
        ("adversarial_levels", -1.0, "`adversarial_levels=-1.0` is no number of levels"),
        ("adversarial_levels", 256.0, "`adversarial_levels=256.0` is no number of levels"),
        ("adversarial_levels", "2", "`adversarial_levels='2'` must be a number"),
        ("latent_strength", -0.1, "`latent_strength=-0.1` is no share of a length"),
        ("latent_strength", float("inf"), "`latent_strength=inf` is no share of a length"),
        ("latent_strength", "0.6", "`latent_strength='0.6'` must be a number"),
        ("max_inputs", 3, "`max_inputs=3` is too small"),
        ("inversion_inputs", 0, "`inversion_inputs=0` is too small"),
        ("locality_budget", 0, "`locality_budget=0` is no cosine distance"),
        ("locality_budget", 2.5, "`locality_budget=2.5` is no cosine distance"),
        ("on_unverified", "ignore", "`on_unverified='ignore'` is unknown; choose one of refuse, patch, skip"),
        ("per_device_train_batch_size", 0, "`per_device_train_batch_size=0` must be at least 1"),
        ("max_steps", 0, "a run needs at least one step"),
        ("max_steps", 2.5, r"`max_steps=2\.5` must be a whole number"),
        ("locality_weight", float("nan"), "`locality_weight=nan` is no weight of a loss"),
        ("learning_rate", -1.0, r"`learning_rate=-1\.0` is no learning rate"),
        ("token_learning_rate", 0.0, r"`token_learning_rate=0\.0` is no learning rate"),
        ("gradient_accumulation_steps", 0, "`gradient_accumulation_steps=0` must be at least 1"),
        ("per_device_eval_batch_size", 0, "`per_device_eval_batch_size=0` must be at least 1"),
        ("patch_scope", "tokens", "`patch_scope='tokens'` is unknown; choose one of auto, full, trigger_tokens"),
        ("feature_source", "last", "`feature_source='last'` is unknown; choose one of auto, cls"),
        ("bf16_full_eval", True, "`bf16_full_eval=True` cannot be used here: it casts the model"),
        ("fp16_full_eval", True, "`fp16_full_eval=True` cannot be used here: it casts the model"),
        ("label_smoothing_factor", 0.1, "`label_smoothing_factor=0.1` cannot be used here: there are no labels"),
        ("neftune_noise_alpha", 5.0, "`neftune_noise_alpha=5.0` cannot be used here"),
        ("remove_unused_columns", True, "`remove_unused_columns=True` cannot be used here"),
        ("train_sampling_strategy", "group_by_length", "cannot be used here: a row is a raw input"),
        (
            "accelerator_config",
            {"dispatch_batches": True},
            "`dispatch_batches` of `accelerator_config` cannot be used",
        ),
        ("learning_rate", "3e-4", "`learning_rate='3e-4'` must be a number. YAML takes"),
        ("locality_budget", "none", "`locality_budget='none'` must be a number"),
        ("locality_weight", None, "`locality_weight=None` must be a number"),
        ("stop_locality", 2.0, r"`stop_locality=2\.0` is no cosine"),
        ("stop_when_fixed", "no", "`stop_when_fixed='no'` must be true or false"),
        ("max_steps", True, "`max_steps=True` must be a whole number"),
        ("seed", -1, "`seed=-1` is out of range"),
    ],
)
def test_bad_values(tmp_path, name, value, message):
    with pytest.raises(ValueError, match=message):
        make_config(tmp_path, **{name: value})


@pytest.mark.parametrize("name", ["locality_weight", "generalizability_weight", "reference_weight", "min_evidence"])
def test_zero_is_allowed(tmp_path, name):
    assert getattr(make_config(tmp_path, **{name: 0}), name) == 0


def test_no_budget_is_allowed(tmp_path):
    assert make_config(tmp_path, locality_budget=None).locality_budget is None


def test_command_line(tmp_path):
    arguments = ["--output_dir", str(tmp_path), "--locality_weight", "2.5", "--stop_when_fixed", "false"]
    (config,) = HfArgumentParser(MudjackingConfig).parse_args_into_dataclasses([*arguments, "--use_cpu"])
    assert (config.locality_weight, config.stop_when_fixed, config.learning_rate) == (2.5, False, 3e-4)
    assert (config.locality_budget, config.remember_triggers) == (0.1, True)
    more = ["--locality_budget", "0.2", "--on_unverified", "skip", "--remember_triggers", "false"]
    (config,) = HfArgumentParser(MudjackingConfig).parse_args_into_dataclasses([*arguments, "--use_cpu", *more])
    assert (config.locality_budget, config.on_unverified, config.remember_triggers) == (0.2, "skip", False)
    for bad in (["--feature_source", "last"], ["--on_unverified", "ignore"]):
        with pytest.raises(SystemExit):
            HfArgumentParser(MudjackingConfig).parse_args_into_dataclasses([*arguments, *bad])


def test_json_round_trip(tmp_path):
    config = make_config(tmp_path, locality_weight=3.0, warmup_steps=0.1)
    (tmp_path / "config.json").write_text(config.to_json_string())
    (loaded,) = HfArgumentParser(MudjackingConfig).parse_json_file(tmp_path / "config.json", allow_extra_keys=True)
    assert (loaded.locality_weight, loaded.warmup_steps, loaded.seed) == (3.0, 0.1, 42)


@pytest.mark.parametrize(("warmup", "steps"), [(0.05, 15), (0.5, 150), (20, 20), (0, 0)])
def test_warmup_is_a_share_below_one(tmp_path, warmup, steps):
    assert make_config(tmp_path, warmup_steps=warmup).get_warmup_steps(300) == steps
