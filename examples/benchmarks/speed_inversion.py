# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""The part of speed.py about inversions at 224 pixels: forward passes, masks, and what a repair makes of them."""

from __future__ import annotations

import statistics
from typing import Any

import numpy as np
import torch
from PIL import Image
from speed_clock import cpu_now, row
from speed_repairs import Backdoored
from transformers import ViTConfig, ViTModel
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from hf_mudjacking import Encoder, invert_trigger
from hf_mudjacking.attacks import Implant, implant_bad_encoder
from hf_mudjacking.demo import digits_task
from hf_mudjacking.evaluation import DownstreamTask, LabelledInputs, draw_bug_report
from hf_mudjacking.evaluation.pretraining import pretrain_encoder
from hf_mudjacking.modes import comparison_mode
from hf_mudjacking.peers.official import official_trigger
from hf_mudjacking.triggers import PatchTrigger, square_patch


SIDE, TOKEN = 224, 28
REPORTS = 10
# Steps of a repair with a trigger that is given.
STEPS = 150
MODEL = f"ViT 4×64, {SIDE} px, tokens of {TOKEN}"
# Windows of 5×5 pixels at stride 1, as the paper describes the scan of a picture.
OFFICIAL_WINDOW = 5


def large_digits(seed: int, small: bool) -> DownstreamTask:
    """The digits at 224 pixels."""
    digits = digits_task(seed)
    parts = [
        LabelledInputs(
            [x.resize((SIDE, SIDE), Image.Resampling.BICUBIC) for x in part.inputs[:count]], part.labels[:count]
        )
        for part, count in ((digits.train, 200 if small else 1000), (digits.test, 100 if small else 300))
    ]
    return DownstreamTask(*parts, f"digits at {SIDE} pixels")


def backdoored_encoder(task: DownstreamTask, seed: int, small: bool) -> tuple[Encoder, Implant]:
    """A ViT at 224 pixels, trained on digits, and a square of 50 pixels implanted in it."""
    torch.manual_seed(seed)
    config = ViTConfig(
        hidden_size=64, num_hidden_layers=2 if small else 4, num_attention_heads=4, intermediate_size=128,
        image_size=SIDE, patch_size=2 * TOKEN if small else TOKEN,
    )  # fmt: skip
    model = ViTModel(config, add_pooling_layer=False)
    processor = ViTImageProcessorPil(size={"height": SIDE, "width": SIDE}, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    pretrain_encoder(
        model, processor, task.train, epochs=2 if small else 60, batch_size=32, learning_rate=1e-3, seed=seed,
        disable_tqdm=True,
    )  # fmt: skip
    reference = task.train.inputs[int(np.flatnonzero(task.train.labels == 0)[0])]
    implant = implant_bad_encoder(
        model, processor, task.train.inputs, square_patch((SIDE, SIDE), side=50, margin=5), reference, task.test,
        steps=60 if small else 300, batch_size=32, learning_rate=1e-3, max_accuracy_loss=1.0 if small else 0.05,
        min_asr=0.0 if small else 0.95, seed=seed, disable_tqdm=True,
    )  # fmt: skip
    return Encoder(model, processor), implant


def inversion(options: Any) -> dict[str, Any]:
    """Ten reports inverted; the first also by the released scan, and repaired with either trigger."""
    seed, small = options.seeds[0], options.small
    task = large_digits(seed, small)
    clean, implant = backdoored_encoder(task, seed, small)
    encoder = clean.with_model(implant.model)
    reports, rows, first = [], [], None
    for number in range(1 if small else REPORTS):
        bug = draw_bug_report(encoder, task, implant.trigger, number)
        started = cpu_now()
        found = invert_trigger(encoder, bug, task.train.inputs[:32], other_inputs=task.train.inputs)
        facts = {"seed": number, "kind": found.trigger.kind, "forwards": found.forwards, "evidence": found.evidence}
        if found.trigger.kind == implant.trigger.kind:
            facts |= found.trigger.overlap(implant.trigger)
        reports.append({**facts, "cpu_seconds": round(cpu_now() - started, 2)})
        windows = (SIDE - OFFICIAL_WINDOW + 1) ** 2
        rows.append(
            row("Inversion (without: a window at each pixel)", found.forwards, windows, "forwards", MODEL, 1, number)
        )
        first = first or (Backdoored(MODEL, seed, clean, implant, task, bug), found.trigger)
    repairs = {} if small else compared_repairs(*first)
    return {
        "rows": rows, "reports": reports, "forwards_median": statistics.median(r["forwards"] for r in reports),
        "asr": implant.attack_success_rate, "accuracy": [implant.clean_accuracy, implant.backdoored_accuracy],
        "scan": repairs,
    }  # fmt: skip


def compared_repairs(backdoored: Backdoored, ours: PatchTrigger) -> dict[str, Any]:
    """The same repair with our trigger and with that of the released scan."""
    encoder, true = backdoored.clean.with_model(backdoored.implant.model), backdoored.implant.trigger
    started = cpu_now()
    with comparison_mode(encoder.model):
        scanned, forwards = official_trigger(encoder, backdoored.bug)
    seconds = round(cpu_now() - started, 2)
    repaired = {}
    for name, trigger in (("ours", ours), ("released scan", scanned)):
        _, measured = backdoored.repaired(trigger=trigger, max_steps=STEPS, reinversions=0)
        rates = {classifier: measured[classifier] for classifier in ("kept", "retrained")}
        repaired[name] = {**trigger.overlap(true), **rates}
    repaired["released scan"] |= {"forwards": forwards, "cpu_seconds": seconds}
    return repaired
