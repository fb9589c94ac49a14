# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""A whole patch of ViT-B/16 at 224 pixels with 10,000 clean inputs on one GPU: wall seconds by part, and FLOPs over the peak.

    python examples/benchmarks/speed_gpu.py --data path/to/cifar10 --output outputs/speed_gpu.json

The encoder is random and is backdoored first, which is not timed: what is measured is the work, not how well it repairs. So
whatever the verdict the report is patched, and nothing is stopped or taken back; bf16 and tf32 are on, and workers make batches. All
other settings are defaults. Variants, each in a process of its own, so that nothing is compiled yet:

- `eager`: steps of 32.
- `compiled`: `torch_compile=True` by regions (`ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION`): one layer, since all are alike.
- `eager_128`, `compiled_128`: steps of 128, as many rows in all.
- `compiled_256`: 75 steps of 256, two passes, with FlashAttention's kernels instead of those of cuDNN.

A step is 3 · (2B + 3) forward passes, the backward pass counted as two; a multiplication and an addition are two FLOPs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from memory import SIZE, vit_base
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from hf_mudjacking import BugInstance, Encoder, MudjackingConfig, MudjackingTrainer
from hf_mudjacking.attacks import ImplantError, implant_bad_encoder
from hf_mudjacking.callbacks import use_compact_progress
from hf_mudjacking.evaluation import DownstreamTask, LabelledInputs, draw_bug_report
from hf_mudjacking.evaluation.report import library_versions
from hf_mudjacking.named_datasets import load_inputs
from hf_mudjacking.output import write_json
from hf_mudjacking.triggers import square_patch


INPUTS = 10_000
# Rows that are trained on, one pass over whole batches of 32 or 128; larger ones take as many steps as those of 128
ROWS, LEAST_STEPS = 9_600, 75
VARIANTS = {
    "eager": {"per_device_train_batch_size": 32},
    "compiled": {"per_device_train_batch_size": 32, "torch_compile": True},
    "eager_128": {"per_device_train_batch_size": 128},
    "compiled_128": {"per_device_train_batch_size": 128, "torch_compile": True},
    "compiled_256": {"per_device_train_batch_size": 256, "torch_compile": True},
}
# The others take what PyTorch prefers, on this kind of GPU cuDNN's kernels
WITH_FLASH_ATTENTION = ("compiled_256",)
# Of the attacker, until one of them takes
LEARNING_RATES = (3e-4, 1e-3)


class TrainingSeconds(TrainerCallback):
    """Wall seconds until training begins, of the whole loop and of its steps alone, with the GPU waited for."""

    def __init__(self) -> None:
        self.loop = 0.0
        self.steps: list[float] = []
        self._begun = self._step = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._begun = time.perf_counter()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        torch.cuda.synchronize()
        self.loop = time.perf_counter() - self._begun

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        torch.cuda.synchronize()
        self._step = time.perf_counter()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        torch.cuda.synchronize()
        self.steps.append(time.perf_counter() - self._step)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="CIFAR-10: Hub id, parquet file or folder")
    parser.add_argument("--output", default="outputs/speed_gpu.json", help="default: outputs/speed_gpu.json")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="default: all")
    parser.add_argument("--workers", type=int, default=12, help="processes that make batches (default: 12)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--peak-tflops", type=float, default=989, help="dense bf16 peak (default: 989, H100 and H200)")
    parser.add_argument("--measure", nargs=2, metavar=("VARIANT", "IMPLANT"), help="measure it in this process")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("a CUDA GPU is needed and PyTorch finds none; `speed.py` measures on CPU.")
    return options


def forward_flops(encoder: Encoder, image: Image.Image) -> int:
    """FLOPs of one forward pass of one picture."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        encoder.features(encoder.preprocess([image]))
    return counter.get_total_flops()


def implant(data: str, folder: Path, seed: int) -> None:
    """Write a backdoored encoder and a report of it to a folder."""
    encoder = Encoder(vit_base().cuda(), ViTImageProcessorPil(size={"height": SIZE, "width": SIZE}))
    pictures = clean_pictures(data).select(range(2000))
    images, labels = pictures["image"], np.asarray(pictures["label"])
    large = [x.convert("RGB").resize((SIZE, SIZE)) for x in images]
    task = DownstreamTask(LabelledInputs(large[:1000], labels[:1000]), LabelledInputs(large[1000:], labels[1000:]))
    trigger = square_patch((SIZE, SIZE), side=50, margin=5)
    for learning_rate in LEARNING_RATES:
        try:
            backdoored = implant_bad_encoder(
                encoder.model, encoder.processing_class, task.train.inputs, trigger, task.train.inputs[0], task.test,
                batch_size=32, steps=200, learning_rate=learning_rate, min_asr=0.9, max_accuracy_loss=1.0, bf16=True,
            )  # fmt: skip
            break
        except ImplantError as error:
            if learning_rate == LEARNING_RATES[-1]:
                raise
            sys.stderr.write(f"{error}\n")
    attacked = encoder.with_model(backdoored.model)
    bug = draw_bug_report(attacked, task, trigger, seed)
    attacked.save_pretrained(folder)
    bug.misclassified.save(folder / "misclassified.png")
    bug.reference.save(folder / "reference.png")


def clean_pictures(data: str) -> datasets.Dataset:
    """CIFAR-10, shuffled."""
    pictures = load_inputs(data).shuffle(seed=0)
    return pictures.rename_column("img", "image") if "img" in pictures.column_names else pictures


def measured(options: argparse.Namespace) -> dict[str, Any]:
    """One variant: wall seconds in parts, and FLOPs used in training over the peak."""
    name, folder = options.measure
    settings = VARIANTS[name]
    if settings.get("torch_compile"):
        os.environ["ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION"] = "true"
        # What an earlier run compiled would be taken
        os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"
    if name in WITH_FLASH_ATTENTION:
        torch.backends.cuda.enable_cudnn_sdp(False)
    encoder = Encoder.load(folder)
    bug = BugInstance(*(Image.open(Path(folder) / f"{x}.png") for x in ("misclassified", "reference")))
    flops = forward_flops(encoder, bug.reference)
    clock = TrainingSeconds()
    parts: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as output_dir:
        trainer = MudjackingTrainer(
            model=encoder.model,
            args=MudjackingConfig(
                output_dir=output_dir, max_steps=max(ROWS // settings["per_device_train_batch_size"], LEAST_STEPS), bf16=True, tf32=True,
                per_device_eval_batch_size=128, stop_when_fixed=False, locality_budget=2.0, on_unverified="patch", save_strategy="no",
                report_to="none", dataloader_num_workers=options.workers, seed=options.seed, **settings,
            ),
            bug_instances=[bug],
            train_dataset=clean_pictures(options.data).select(range(INPUTS)).select_columns("image"),
            processing_class=encoder.processing_class,
            callbacks=[clock],
        )  # fmt: skip
        use_compact_progress(trainer)
        torch.cuda.reset_peak_memory_stats()
        for part, work in (
            ("inversion", trainer.invert_triggers), ("training", trainer.train), ("saving", trainer.save_model),
        ):  # fmt: skip
            started = time.perf_counter()
            work()
            torch.cuda.synchronize()
            parts[part] = time.perf_counter() - started
    rows = 2 * trainer.args.train_batch_size + 3
    peak = options.peak_tflops * 1e12
    # The first steps compile, and pick their kernels
    tenth = len(clock.steps) // 10
    before, after = (float(np.median(steps)) for steps in (clock.steps[tenth : 2 * tenth], clock.steps[2 * tenth :]))
    per_step = 3 * rows * flops
    return {
        "gpu": torch.cuda.get_device_name(),
        "verdict": trainer.screenings[0].verdict,
        "seconds": {
            **{part: round(seconds, 2) for part, seconds in parts.items()},
            "whole": round(sum(parts.values()), 2),
            "of_training": {
                "preparation": round(parts["training"] - clock.loop, 2),
                "loop": round(clock.loop, 2),
                "steps_alone": round(sum(clock.steps), 2),
                # Before the first reinversion, and after it, when the main process stamps some rows itself
                "step_before": round(before, 4),
                "step_after": round(after, 4),
            },
        },
        "forward_gflop": round(flops / 1e9, 2),
        "training_pflop": round(per_step * len(clock.steps) / 1e15, 3),
        "utilisation": {
            "step_before": round(per_step / before / peak, 4),
            "step_after": round(per_step / after / peak, 4),
            "steps": round(per_step * len(clock.steps) / sum(clock.steps) / peak, 4),
            "loop": round(per_step * len(clock.steps) / clock.loop / peak, 4),
            "training": round(per_step * len(clock.steps) / parts["training"] / peak, 4),
        },
        "peak_memory_mib": round(torch.cuda.max_memory_allocated() / 2**20),
        "steps": len(clock.steps),
        "batch_size": trainer.args.train_batch_size,
        "workers": options.workers,
        "seed": options.seed,
        "versions": library_versions(),
    }


def main() -> int:
    options = parse_arguments()
    output = Path(options.output)
    if options.measure:
        write_json(output, measured(options))
        return 0
    result = json.loads(output.read_text(encoding="utf-8")) if output.exists() else {}
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        implant(options.data, Path(folder), options.seed)
        for name in options.variants:
            part = Path(folder) / f"{name}.json"
            command = [sys.executable, __file__, "--data", options.data, "--output", str(part), "--workers",
                       str(options.workers), "--seed", str(options.seed), "--peak-tflops", str(options.peak_tflops),
                       "--measure", name, folder]  # fmt: skip
            if subprocess.run(command).returncode:
                sys.stderr.write(f"`{name}` failed.\n")
                failed += 1
                continue
            result[name] = json.loads(part.read_text(encoding="utf-8"))
            write_json(output, result)
            sys.stderr.write(f"{name}: {json.dumps(result[name])}\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
