# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""The part of speed.py that counts forward passes of an inversion at 224 pixels."""

from __future__ import annotations

import statistics
from typing import Any

import numpy as np
import torch
from PIL import Image
from speed_clock import cpu_now, row
from transformers import ViTConfig, ViTModel
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from hf_mudjacking import Encoder, invert_trigger
from hf_mudjacking.attacks import implant_bad_encoder
from hf_mudjacking.demo import digits_task
from hf_mudjacking.evaluation import DownstreamTask, LabelledInputs, draw_bug_report
from hf_mudjacking.evaluation.pretraining import pretrain_encoder
from hf_mudjacking.triggers import square_patch


SIDE = 224
# Windows of 5×5 pixels at stride 1, as the released code scans a picture.
OFFICIAL_WINDOW = 5


def large_digits(seed: int) -> DownstreamTask:
    """The digits at 224 pixels."""
    small = digits_task(seed)
    parts = [
        LabelledInputs(
            [x.resize((SIDE, SIDE), Image.Resampling.BICUBIC) for x in part.inputs[:count]], part.labels[:count]
        )
        for part, count in ((small.train, 600), (small.test, 200))
    ]
    return DownstreamTask(*parts, "digits at 224 pixels")


def inversion(options: Any) -> dict[str, Any]:
    """Forward passes, recall and IoU of `invert_trigger` for reports of a square of 50 pixels in a ViT at 224 pixels."""
    seed, small = options.seeds[0], options.small
    task = large_digits(seed)
    torch.manual_seed(seed)
    config = ViTConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, image_size=SIDE,
        patch_size=56 if small else 32,
    )  # fmt: skip
    model = ViTModel(config, add_pooling_layer=False)
    processor = ViTImageProcessorPil(size={"height": SIDE, "width": SIDE}, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    pretrain_encoder(
        model, processor, task.train, epochs=2 if small else 20, batch_size=32, learning_rate=2e-3, seed=seed,
        disable_tqdm=True,
    )  # fmt: skip
    trigger = square_patch((SIDE, SIDE), side=50, margin=5)
    implant = implant_bad_encoder(
        model, processor, task.train.inputs, trigger, task.train.inputs[int(np.flatnonzero(task.train.labels == 0)[0])],
        task.test, steps=60 if small else 150, batch_size=32, learning_rate=1e-3, max_accuracy_loss=1.0 if small else 0.05,
        min_asr=0.0 if small else 0.95, seed=seed, disable_tqdm=True,
    )  # fmt: skip
    encoder = Encoder(implant.model, processor)
    windows = (SIDE - OFFICIAL_WINDOW + 1) ** 2
    reports, rows = [], []
    for number in range(1 if small else 5):
        bug = draw_bug_report(encoder, task, trigger, number)
        started = cpu_now()
        found = invert_trigger(encoder, bug, task.train.inputs[:32], other_inputs=task.train.inputs)
        facts = {"seed": number, "kind": found.trigger.kind, "forwards": found.forwards, "evidence": found.evidence}
        if found.trigger.kind == trigger.kind:
            facts |= found.trigger.overlap(trigger)
        reports.append({**facts, "cpu_seconds": round(cpu_now() - started, 2)})
        rows.append(
            row("Inversion (without: a window at each pixel)", found.forwards, windows, "forwards",
                "ViT 2×64, 224 px, tokens of 32", 1, number)
        )  # fmt: skip
    forwards = [report["forwards"] for report in reports]
    return {
        "rows": rows, "reports": reports, "forwards_median": statistics.median(forwards),
        "asr": implant.attack_success_rate, "accuracy": [implant.clean_accuracy, implant.backdoored_accuracy],
    }  # fmt: skip
