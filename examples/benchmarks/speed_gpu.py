# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""The part of speed.py that needs a GPU: a whole patch of ViT-B/16 at 224 pixels, on the wall clock."""

from __future__ import annotations

import tempfile
import time
from typing import Any

import numpy as np
import torch
from memory import SIZE, vit_base
from torch.utils.flop_counter import FlopCounterMode
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from hf_mudjacking import Encoder, MudjackingConfig, MudjackingTrainer
from hf_mudjacking.attacks import Implant, implant_bad_encoder
from hf_mudjacking.callbacks import use_compact_progress
from hf_mudjacking.evaluation import DownstreamTask, LabelledInputs, draw_bug_report
from hf_mudjacking.evaluation.report import library_versions
from hf_mudjacking.named_datasets import load_inputs
from hf_mudjacking.triggers import square_patch


class TrainingSeconds(TrainerCallback):
    """Wall seconds from the first step to the last, and in steps alone, with the GPU waited for."""

    def __init__(self) -> None:
        self.in_steps = 0.0
        self._step = 0.0

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        torch.cuda.synchronize()
        self._step = time.perf_counter()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        torch.cuda.synchronize()
        self.in_steps += time.perf_counter() - self._step


def forward_flops(encoder: Encoder, image: Any) -> int:
    """FLOPs of one forward pass of one picture, a multiplication and an addition counted as two."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        encoder.features(encoder.preprocess([image]))
    return counter.get_total_flops()


def backdoored_encoder(encoder: Encoder, task: DownstreamTask, batch_size: int) -> Implant:
    """BadEncoder in an encoder that nobody trained: what is measured is the work, not how well it repairs."""
    trigger = square_patch((SIZE, SIZE), side=50, margin=5)
    return implant_bad_encoder(
        encoder.model, encoder.processing_class, task.train.inputs, trigger, task.train.inputs[0], task.test,
        batch_size=batch_size, steps=200, learning_rate=1e-4, min_asr=0.9, max_accuracy_loss=1.0, bf16=True,
    )  # fmt: skip


def gpu_patch(options: Any) -> dict[str, Any]:
    """Wall seconds of a whole patch of ViT-B/16 with 10,000 clean inputs, in parts, and FLOPs used in training over the peak.

    The encoder is random and is backdoored first, which is not timed. All settings are defaults, but that nothing is stopped
    early, bf16 is on and eight workers make batches.
    """
    encoder = Encoder(vit_base().cuda(), ViTImageProcessorPil(size={"height": SIZE, "width": SIZE}))
    pictures = load_inputs(options.data).shuffle(seed=0)
    if "img" in pictures.column_names:
        pictures = pictures.rename_column("img", "image")
    large = [x.convert("RGB").resize((SIZE, SIZE)) for x in pictures.select(range(2000))["image"]]
    labels = np.asarray(pictures.select(range(2000))["label"])
    task = DownstreamTask(LabelledInputs(large[:1000], labels[:1000]), LabelledInputs(large[1000:], labels[1000:]))
    implant = backdoored_encoder(encoder, task, batch_size=64)
    backdoored = encoder.with_model(implant.model)
    bug = draw_bug_report(backdoored, task, implant.trigger, options.seeds[0])
    flops = forward_flops(backdoored, large[0])

    clock = TrainingSeconds()
    parts: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        trainer = MudjackingTrainer(
            model=implant.model,
            args=MudjackingConfig(
                output_dir=folder, bf16=True, stop_when_fixed=False, save_strategy="no", report_to="none",
                dataloader_num_workers=8, seed=options.seeds[0],
            ),
            bug_instances=[bug],
            train_dataset=pictures.select(range(10_000)).select_columns("image"),
            processing_class=encoder.processing_class,
            callbacks=[clock],
        )  # fmt: skip
        use_compact_progress(trainer)
        for name, work in (
            ("inversion", trainer.invert_triggers), ("training", trainer.train), ("saving", trainer.save_model),
        ):  # fmt: skip
            started = time.perf_counter()
            work()
            torch.cuda.synchronize()
            parts[name] = round(time.perf_counter() - started, 2)
    rows = 2 * trainer.args.train_batch_size + 3
    used = 3 * rows * trainer.state.global_step * flops
    return {
        "gpu": torch.cuda.get_device_name(),
        "seconds": {**parts, "steps_alone": round(clock.in_steps, 2), "whole": round(sum(parts.values()), 2)},
        "forward_gflop": round(flops / 1e9, 2),
        "training_pflop": round(used / 1e15, 3),
        "utilisation_of_steps": round(used / clock.in_steps / (options.peak_tflops * 1e12), 4),
        "utilisation_of_training": round(used / parts["training"] / (options.peak_tflops * 1e12), 4),
        "peak_memory_mib": round(torch.cuda.max_memory_allocated() / 2**20),
        "steps": trainer.state.global_step,
        "versions": library_versions(),
    }
