# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""How much memory patching takes, against the procedure of the released Mudjacking code, on CPU.

    python examples/benchmarks/memory.py --output outputs/memory.json

A ViT-B/16 made from its configuration is patched for a few steps with the same batch in three ways, each in a process of its own:

- `official`: the step as the released code describes it. Two resident models; five streams (x, x ⊕ e, x_b, x_r, x_r ⊕ e) of a
  whole batch each, augmented independently; the frozen model is run again in every step; SGD of momentum 0.9 and learning
  rate 1e-3. Hue is not jittered, which costs no memory.
- `full`: `MudjackingTrainer` with its defaults (AdamW, one forward, stored features of the frozen model, a locality budget).
- `lora`: the same with an adapter.

Neither inverts: the trigger is known, and `reinversions=0`. What is measured is the highest resident memory of the process
(`VmHWM`, Linux) above what it was after the imports, so model, gradients, optimiser, activations and inputs all count. Two
steps are enough: in the second, optimiser states and activations are there together.

Every process has `MALLOC_MMAP_THRESHOLD_=131072`, with which glibc gives back at once what is freed, so that the peak is that of
memory in use. `--default-malloc` leaves glibc as it is: the many temporaries of an adapter then leave holes that it cannot fill.
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

import datasets
import numpy as np
import torch
from peft import LoraConfig
from PIL import Image
from torch import Tensor
from transformers import ViTConfig, ViTModel
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from hf_mudjacking import BugInstance, Encoder, MudjackingConfig, MudjackingTrainer
from hf_mudjacking.evaluation.report import library_versions
from hf_mudjacking.losses import effectiveness_loss, generalizability_loss, locality_loss, mudjacking_loss
from hf_mudjacking.modes import frozen, set_comparison_mode
from hf_mudjacking.output import write_json
from hf_mudjacking.triggers import square_patch


SIZE = 224


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default="outputs/memory.json")
    parser.add_argument("--batch-size", type=int, default=8, help="clean inputs a step (default: 8)")
    parser.add_argument("--steps", type=int, default=2, help="steps of each (default: 2)")
    parser.add_argument("--lora-rank", type=int, default=4)
    parser.add_argument("--default-malloc", action="store_true", help="do not set MALLOC_MMAP_THRESHOLD_")
    parser.add_argument("--only", choices=PROCEDURES, help="measure this one, in this process")
    return parser.parse_args()


def vit_base() -> ViTModel:
    """ViT-B/16 at 224 pixels, random, but with features that differ from image to image as a trained model's do."""
    torch.manual_seed(0)
    model = ViTModel(ViTConfig(), add_pooling_layer=False)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() in (2, 4):
                parameter.mul_(4)
    return model.eval()


class Inputs:
    """What both procedures start from: clean images, a trigger, a report."""

    def __init__(self, count: int) -> None:
        rng = np.random.default_rng(0)
        self.images = [Image.fromarray(rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)) for _ in range(count)]
        self.trigger = square_patch((SIZE, SIZE), side=70, margin=7)
        self.bug = BugInstance(self.trigger.apply(self.images[0]), self.images[1])
        self.processor = ViTImageProcessorPil(size={"height": SIZE, "width": SIZE})


def patch(options: argparse.Namespace, lora: bool) -> None:
    """Patch with this library."""
    inputs = Inputs(options.batch_size * options.steps)
    features = datasets.Features({"image": datasets.Image()})
    with tempfile.TemporaryDirectory() as folder:
        trainer = MudjackingTrainer(
            model=vit_base(),
            args=MudjackingConfig(
                output_dir=folder,
                max_steps=options.steps,
                per_device_train_batch_size=options.batch_size,
                per_device_eval_batch_size=options.batch_size,
                reinversions=0,
                # Kept, but so wide that no random model breaks it
                locality_budget=2.0,
                stop_when_fixed=False,
                save_strategy="no",
                report_to="none",
                use_cpu=True,
                disable_tqdm=True,
                dataloader_pin_memory=False,
            ),
            bug_instances=[inputs.bug],
            train_dataset=datasets.Dataset.from_dict({"image": inputs.images}, features=features),
            processing_class=inputs.processor,
            peft_config=LoraConfig(r=options.lora_rank, lora_alpha=options.lora_rank) if lora else None,
            triggers=[inputs.trigger],
        )
        trainer.train()


def patch_officially(options: argparse.Namespace) -> None:
    """Patch with the step of the released code."""
    inputs = Inputs(options.batch_size * options.steps)
    reference_model, model = vit_base(), vit_base()
    reference_encoder, encoder = (Encoder(m, inputs.processor) for m in (reference_model, model))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-4)
    generator = torch.Generator().manual_seed(0)
    with frozen(reference_model.parameters()):
        for step in range(options.steps):
            x = inputs.images[step * options.batch_size : (step + 1) * options.batch_size]
            reports = [[image] * len(x) for image in (inputs.bug.misclassified, inputs.bug.reference)]
            streams = [x, [inputs.trigger.apply(image) for image in x], *reports]
            streams.append([inputs.trigger.apply(image) for image in reports[1]])
            views = [augmented(encoder.preprocess(stream)["pixel_values"], generator) for stream in streams]
            set_comparison_mode(model)
            with torch.no_grad():
                before, reference_before = (reference_encoder.features({"pixel_values": views[i]}) for i in (0, 3))
            clean, stamped, misclassified, reference, stamped_reference = (
                encoder.features({"pixel_values": view}) for view in views
            )
            loss = mudjacking_loss(
                effectiveness_loss(misclassified, reference, torch.ones(len(x))),
                locality_loss(clean, before, reference, reference_before),
                generalizability_loss(stamped, clean, stamped_reference, reference),
            ).total
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def augmented(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Flip half of the images, jitter brightness, contrast and saturation of 80 % by 0.4, make 20 % grey."""

    def share(probability: float) -> Tensor:
        return (torch.rand(len(pixels), 1, 1, 1, generator=generator) < probability).float()

    def factor() -> Tensor:
        return 1 + share(0.8) * (0.8 * torch.rand(len(pixels), 1, 1, 1, generator=generator) - 0.4)

    flip = share(0.5)
    pixels = flip * pixels.flip(3) + (1 - flip) * pixels
    pixels = factor() * pixels
    mean = pixels.mean(dim=(1, 2, 3), keepdim=True)
    pixels = mean + factor() * (pixels - mean)
    grey = pixels.mean(dim=1, keepdim=True)
    return grey + factor() * (1 - share(0.2)) * (pixels - grey)


PROCEDURES = {
    "official": patch_officially,
    "full": lambda options: patch(options, lora=False),
    "lora": lambda options: patch(options, lora=True),
}


def resident_mb(field: str) -> int:
    """`VmRSS`, resident memory now, or `VmHWM`, its highest value so far."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) // 1024 for line in lines if line.startswith(field))


def main() -> None:
    options = parse_arguments()
    if options.only is not None:
        torch.set_num_threads(1)
        baseline, started = resident_mb("VmRSS"), time.perf_counter()
        PROCEDURES[options.only](options)
        measured = {"baseline_mb": baseline, "peak_mb": resident_mb("VmHWM") - baseline}
        sys.stdout.write(json.dumps({**measured, "seconds": round(time.perf_counter() - started, 1)}) + "\n")
        return
    report: dict = {
        "model": "ViT-B/16 at 224 pixels, float32, from its configuration",
        "settings": {name: getattr(options, name) for name in ("batch_size", "steps", "lora_rank", "default_malloc")},
        "measured": "highest resident memory of a fresh process above that after the imports, CPU, one thread",
    }
    environment = dict(os.environ) if options.default_malloc else {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072"}
    for name in PROCEDURES:
        command = [sys.executable, __file__, "--only", name]
        command += ["--batch-size", str(options.batch_size), "--steps", str(options.steps)]
        command += ["--lora-rank", str(options.lora_rank)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
        report[name] = json.loads(done.stdout.splitlines()[-1])
        sys.stderr.write(f"{name}: {report[name]}\n")
    report["ratios"] = {n: round(report[n]["peak_mb"] / report["official"]["peak_mb"], 3) for n in ("full", "lora")}
    sys.stderr.write(f"Of the official procedure's peak: {report['ratios']}\n")
    write_json(options.output, {**report, "versions": library_versions()})


if __name__ == "__main__":
    main()
