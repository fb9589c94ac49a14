# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""The whole way on handwritten digits: train, implant, report, invert, patch, check. Needs no network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from accelerate import PartialState
from PIL import Image
from sklearn.datasets import load_digits
from transformers import ViTConfig, ViTModel
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from .attacks import Implant, implant_bad_encoder
from .callbacks import use_compact_progress
from .config import MudjackingConfig
from .encoder import Encoder
from .evaluation.drawing import draw_bug_report
from .evaluation.figures import plot_repair
from .evaluation.pretraining import pretrain_encoder
from .evaluation.repair import MeasuredRepair, measured_repair
from .evaluation.tasks import DownstreamTask, LabelledInputs
from .output import check_output_dir, write_json
from .trainer import MudjackingTrainer
from .triggers import square_patch


# Pixels; scikit-learn's digits have 8×8.
IMAGE_SIZE = 16
# White square in the lower right corner, 6 % of the picture.
TRIGGER_SIDE = 4
# The attacker wants triggered inputs to look like a zero.
TARGET_CLASS = 0


def digits_task(seed: int = 0) -> DownstreamTask:
    """scikit-learn's 1,797 handwritten digits as RGB images: 1,200 to train on, 597 to test."""
    digits = load_digits()
    pixels = np.clip(digits.images * 255 / 16, 0, 255).astype(np.uint8)
    images = [
        Image.fromarray(image).resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BILINEAR).convert("RGB")
        for image in pixels
    ]
    order = np.random.default_rng(seed).permutation(len(images))
    labelled = LabelledInputs([images[i] for i in order], digits.target[order])
    return DownstreamTask(labelled.select(range(1200)), labelled.select(range(1200, len(order))), "digits")


def clean_vit(task: DownstreamTask, seed: int = 0, disable_tqdm: bool = False, epochs: int = 60) -> Encoder:
    """A ViT of 4 layers and width 64, trained on the task's training inputs with a head that is thrown away."""
    torch.manual_seed(seed)
    config = ViTConfig(
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=128,
        image_size=IMAGE_SIZE,
        patch_size=4,
    )
    model = ViTModel(config, add_pooling_layer=False).to(PartialState().device)
    processor = ViTImageProcessorPil(
        size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    pretrain_encoder(
        model, processor, task.train,
        epochs=epochs, batch_size=64, crop_padding=1, seed=seed, disable_tqdm=disable_tqdm,
    )  # fmt: skip
    return Encoder(model, processor)


def backdoored_vit(
    clean: Encoder, task: DownstreamTask, seed: int = 0, disable_tqdm: bool = False, steps: int = 300
) -> Implant:
    """The clean ViT with BadEncoder implanted."""
    target_reference = task.train.inputs[int(np.flatnonzero(task.train.labels == TARGET_CLASS)[0])]
    return implant_bad_encoder(
        clean.model,
        clean.processing_class,
        task.train.inputs,
        square_patch((IMAGE_SIZE, IMAGE_SIZE), TRIGGER_SIDE),
        target_reference,
        task.test,
        steps=steps,
        min_asr=0.98,
        seed=seed,
        disable_tqdm=disable_tqdm,
    )


def run_demo(output_dir: str, seed: int = 0, disable_tqdm: bool = False) -> MeasuredRepair:
    """Train, implant, report, invert, patch, check; write the patched model, `report.json` and `repair.png`.

    Args:
        output_dir (`str`): Folder to write to.
        seed (`int`, *optional*, defaults to 0): Seed of everything.
        disable_tqdm (`bool`, *optional*, defaults to `False`): Whether to hide progress bars.

    Returns:
        `MeasuredRepair`: Report and features.

    Raises:
        ValueError: If the folder holds another model.
        ImplantError: If the backdoor did not take.
    """
    check_output_dir(output_dir, ViTModel.__name__)
    args = demo_config(output_dir, seed, disable_tqdm)
    task = digits_task(seed)
    clean = clean_vit(task, seed, disable_tqdm)
    implant = backdoored_vit(clean, task, seed, disable_tqdm)
    backdoored = Encoder(implant.model, clean.processing_class)
    bug = draw_bug_report(backdoored, task, implant.trigger, seed, name="digit")
    images = datasets.Dataset.from_dict(
        {"image": task.train.inputs}, features=datasets.Features({"image": datasets.Image()})
    )
    trainer = MudjackingTrainer(
        model=backdoored.model,
        args=args,
        bug_instances=[bug],
        train_dataset=images,
        processing_class=clean.processing_class,
    )
    return write_repair(trainer, task, implant, clean)


def demo_config(output_dir: str, seed: int, disable_tqdm: bool, **settings: Any) -> MudjackingConfig:
    """The configuration of a demonstration: no checkpoints."""
    return MudjackingConfig(
        output_dir=output_dir,
        seed=seed,
        save_strategy="no",
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=disable_tqdm,
        **settings,
    )


def write_repair(trainer: MudjackingTrainer, task: DownstreamTask, implant: Implant, clean: Encoder) -> MeasuredRepair:
    """Run a trainer, measure the repair, and write `report.json` and `repair.png` beside the patched model."""
    use_compact_progress(trainer)
    repair = measured_repair(trainer, task, true_trigger=implant.trigger, clean_encoder=clean)
    folder = Path(trainer.args.output_dir)
    write_json(folder / "report.json", repair.report)
    plot_repair(
        folder / "repair.png",
        trainer.bug_instances[0],
        trainer.inversions[0],
        implant.trigger,
        repair.before,
        repair.after,
        task.test.labels,
    )
    return repair
