# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""Repair a ViT that was trained on CIFAR-10 and backdoored with BadEncoder; check it on traffic signs.

    accelerate launch examples/patch_vit.py --output-dir outputs/patch_vit
    accelerate launch --config_file examples/accelerate_configs/multi_gpu.yaml examples/patch_vit.py    # a process for each GPU
    torchrun --nproc_per_node 2 examples/patch_vit.py                          # the same without accelerate's launcher

Both datasets are Hub ids by default; `--pretraining` and `--downstream` also take a folder with `train*.parquet` and
`test*.parquet` (columns `image` and `label`). The steps: train a small ViT on CIFAR-10 labels and drop its head (skipped with
`--encoder`), implant BadEncoder with the published 10×10 trigger, draw one bug report from the downstream test set,
invert, patch, and compare before and after. About 45 minutes on 2 cores, most of it for the encoder; a second run finds
the encoder and the implant in the output directory and starts at the report. Of several processes the first trains and attacks
the encoder, and it alone writes and prints; all invert and patch, with `--batch-size` clean inputs each.
"""

from __future__ import annotations

import argparse
import sys
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from kept_models import chosen, found
from rich.console import Console
from transformers import AutoImageProcessor, AutoModel, ViTConfig, ViTModel
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from hf_mudjacking import Encoder, MudjackingConfig, MudjackingTrainer
from hf_mudjacking.attacks import ImplantError, implant_bad_encoder
from hf_mudjacking.callbacks import use_compact_progress
from hf_mudjacking.evaluation import DownstreamTask, LabelledInputs, draw_bug_report, pretrain_encoder
from hf_mudjacking.evaluation.figures import plot_repair
from hf_mudjacking.evaluation.repair import measured_repair
from hf_mudjacking.evaluation.report import report_lines, report_tables
from hf_mudjacking.named_datasets import load_inputs
from hf_mudjacking.output import check_output_dir, write_json
from hf_mudjacking.processes import from_first
from hf_mudjacking.triggers import square_patch


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pretraining", default="uoft-cs/cifar10", help="Hub id or folder (default: uoft-cs/cifar10)")
    parser.add_argument("--downstream", default="tanganke/gtsrb", help="Hub id or folder (default: tanganke/gtsrb)")
    parser.add_argument(
        "--encoder", help="folder or Hub id of a clean encoder for 32×32 images, instead of training one"
    )
    parser.add_argument(
        "--output-dir", default="outputs/patch_vit", help="folder for the encoder, the patch, the report"
    )
    parser.add_argument("--pretraining-epochs", type=int, default=8, help="epochs to train the encoder (default: 8)")
    parser.add_argument("--implant-steps", type=int, default=1000, help="steps of the attack (default: 1000)")
    parser.add_argument("--downstream-inputs", type=int, default=6000, help="labelled training inputs (default: 6000)")
    parser.add_argument("--test-inputs", type=int, default=3000, help="labelled test inputs (default: 3000)")
    parser.add_argument("--target-class", type=int, help="class the attacker wants (default: the most frequent one)")
    parser.add_argument("--batch-size", type=int, default=32, help="clean inputs per process and step (default: 32)")
    parser.add_argument("--max-steps", type=int, default=600, help="patching steps (default: 600)")
    parser.add_argument("--learning-rate", type=float, default=3e-4, help="of the patch (default: 3e-4)")
    parser.add_argument("--lora-rank", type=int, help="make the patch a LoRA adapter of this rank")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--disable-tqdm", action="store_true", help="show no progress bars")
    return parser.parse_args()


def clean_encoder(options: argparse.Namespace, device: torch.device) -> Encoder:
    """The encoder the user names, or a small ViT trained on the pretraining set."""
    folder = Path(options.output_dir) / "clean_encoder"
    if options.encoder is not None or found(folder, chosen(options, "pretraining", "pretraining_epochs", "seed")):
        source = options.encoder or folder
        model = AutoModel.from_pretrained(source, dtype=torch.float32)
        return Encoder(model.to(device), AutoImageProcessor.from_pretrained(source))
    data = LabelledInputs.from_dataset(with_columns(load_inputs(options.pretraining, "train")))
    torch.manual_seed(options.seed)
    config = ViTConfig(
        hidden_size=128, num_hidden_layers=4, num_attention_heads=4, intermediate_size=512, image_size=32, patch_size=4
    )
    model = ViTModel(config, add_pooling_layer=False).to(device)
    processor = ViTImageProcessorPil(size={"height": 32, "width": 32}, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    pretrain_encoder(
        model,
        processor,
        data,
        epochs=options.pretraining_epochs,
        crop_padding=4,
        horizontal_flip=True,
        bf16=True,
        seed=options.seed,
        disable_tqdm=options.disable_tqdm,
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return Encoder(model, processor)


def implant(options, folder, clean, task, trigger, pretraining, console) -> None:
    """Write what a user has: a checkpoint with a backdoor in it. One that is there from an earlier run is used again."""
    names = ("pretraining", "encoder", "pretraining_epochs", "downstream", "downstream_inputs", "test_inputs", "implant_steps",
             "target_class", "seed")  # fmt: skip
    if found(folder, chosen(options, *names)):
        return
    target = int(np.bincount(task.train.labels).argmax()) if options.target_class is None else options.target_class
    target_reference = task.train.inputs[int(np.flatnonzero(task.train.labels == target)[0])]
    shadow = pretraining.shuffle(seed=options.seed).select(range(min(10_000, len(pretraining))))
    result = implant_bad_encoder(
        clean.model,
        clean.processing_class,
        list(shadow["image"]),
        trigger,
        target_reference,
        task.test,
        steps=options.implant_steps,
        bf16=True,
        seed=options.seed,
        disable_tqdm=options.disable_tqdm,
    )
    console.print(
        f"Implant: BA {result.backdoored_accuracy:.3f} (clean {result.clean_accuracy:.3f}), "
        f"ASR {result.attack_success_rate:.3f}, target class {target}"
    )
    result.model.save_pretrained(folder)
    clean.processing_class.save_pretrained(folder)


def with_columns(dataset):
    """CIFAR-10 on the Hub calls its image column `img`."""
    return dataset.rename_column("img", "image") if "img" in dataset.column_names else dataset


def main() -> int:
    try:
        return repair()
    except ImplantError as error:
        sys.stderr.write(f"{error} Here that is --implant-steps, or an encoder of more --pretraining-epochs.\n")
        return 2


def repair() -> int:
    options = parse_arguments()
    # The others wait while the first process trains the encoder
    state = PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(hours=6))
    console = Console(highlight=False, quiet=not state.is_main_process)
    console.print(f"{state.num_processes} process(es)")
    options.disable_tqdm = options.disable_tqdm or not state.is_main_process
    output_dir, backdoored = Path(options.output_dir) / "patched", Path(options.output_dir) / "backdoored_encoder"
    try:
        check_output_dir(output_dir, str(backdoored))
        pretraining = with_columns(load_inputs(options.pretraining, "train"))
        parts = [load_inputs(options.downstream, split).shuffle(seed=options.seed) for split in ("train", "test")]
    except ValueError as error:
        if state.is_main_process:
            sys.stderr.write(f"{error}\nBoth datasets can be given as folders: --pretraining DIR --downstream DIR.\n")
        return 2
    sizes = (options.downstream_inputs, options.test_inputs)
    parts = [part.select(range(min(size, len(part)))) for part, size in zip(parts, sizes, strict=True)]
    trigger = square_patch((32, 32), side=10, margin=1)
    with state.main_process_first():
        # Traffic signs come in many sizes; the published trigger is defined on 32×32 pixels.
        parts = [part.map(lambda row: {"image": row["image"].convert("RGB").resize((32, 32))}) for part in parts]
        task = DownstreamTask.from_datasets(*parts, name=Path(options.downstream).name)
        clean = clean_encoder(options, state.device)
        implant(options, backdoored, clean, task, trigger, pretraining, console)
    broken = Encoder(AutoModel.from_pretrained(backdoored, dtype=torch.float32), clean.processing_class)
    bug = from_first(draw_bug_report(broken, task, trigger, options.seed))

    peft_config = None
    if options.lora_rank is not None:
        from peft import LoraConfig

        peft_config = LoraConfig(r=options.lora_rank, lora_alpha=options.lora_rank)
    trainer = MudjackingTrainer(
        model=str(backdoored),
        args=MudjackingConfig(
            output_dir=str(output_dir),
            seed=options.seed,
            max_steps=options.max_steps,
            # This encoder is weak: a stop before the learning rate has decayed left ASR 4 points higher with the classifier kept.
            stop_when_fixed=False,
            learning_rate=options.learning_rate,
            per_device_train_batch_size=options.batch_size,
            use_cpu=not torch.accelerator.is_available(),
            save_strategy="no",
            dataloader_pin_memory=torch.cuda.is_available(),
            disable_tqdm=options.disable_tqdm,
        ),
        bug_instances=[bug],
        train_dataset=pretraining,
        peft_config=peft_config,
    )
    use_compact_progress(trainer)
    measured = measured_repair(trainer, task, true_trigger=trigger, clean_encoder=clean)
    if state.is_main_process:
        write_json(output_dir / "report.json", measured.report)
        plot_repair(output_dir / "_repair.png", bug, trainer.inversions[0], trigger, measured.before, measured.after)
    for table in report_tables(measured.report):
        console.print(table)
    for line in report_lines(measured.report):
        console.print(line, markup=False)
    console.print(f"Patched model, report.json and _repair.png are in {output_dir}/", markup=False)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
