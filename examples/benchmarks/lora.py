# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""Does a LoRA adapter repair as well as full weights? Both, from the same implants that `mudjack benchmark` left.

    mudjack benchmark --config examples/benchmarks/attacks.yaml --attacks bad_encoder --seeds 0 1 --implants-only
    python examples/benchmarks/lora.py --implants outputs/attacks/implants/resnet --encoder outputs/attacks/encoders/resnet

For each implant one report from the first dataset, repaired with full weights and with adapters on all linear and
convolution layers; `RANK:ALPHA:LEARNING_RATE` names an adapter. The result is written after every repair; those that are in
the output are not run again.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig
from rich.console import Console
from rich.table import Table
from transformers import AutoImageProcessor, AutoModel

from hf_mudjacking import Encoder, MudjackingConfig, MudjackingTrainer, load_trigger
from hf_mudjacking.callbacks import use_compact_progress
from hf_mudjacking.evaluation import DownstreamTask, LabelledInputs, draw_bug_report
from hf_mudjacking.evaluation.repair import measured_repair
from hf_mudjacking.named_datasets import load_inputs
from hf_mudjacking.output import write_json


FULL = "full weights"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="uoft-cs/cifar10", help="Hub id or folder (default: uoft-cs/cifar10)")
    parser.add_argument("--implants", required=True, help="folder of implants, one sub-folder each")
    parser.add_argument("--encoder", required=True, help="folder of the clean encoder")
    parser.add_argument("--output", default="outputs/lora.json")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1], help="of `bad_encoder-<seed>` (default: 0 1)")
    parser.add_argument("--adapters", nargs="+", default=["4:4:3e-3"], metavar="RANK:ALPHA:LEARNING_RATE")
    parser.add_argument("--learning-rate", type=float, default=3e-4, help="of full weights (default: 3e-4)")
    parser.add_argument("--max-steps", type=int, default=300, help="patching steps (default: 300)")
    parser.add_argument("--inputs", type=int, default=5000, help="clean inputs (default: 5000)")
    parser.add_argument(
        "--task-inputs", type=int, default=2000, help="to train the classifier, and to test (default: 2000)"
    )
    parser.add_argument("--disable-tqdm", action="store_true", help="show no progress bars")
    return parser.parse_args()


def loaded(folder: str | Path, like: str | Path) -> Encoder:
    model = AutoModel.from_pretrained(folder, dtype=torch.float32)
    return Encoder(model, AutoImageProcessor.from_pretrained(like))


def drawn(dataset, count: int, seed: int):
    """CIFAR-10 on the Hub calls its image column `img`."""
    dataset = dataset.rename_column("img", "image") if "img" in dataset.column_names else dataset
    return dataset.select(np.random.default_rng(seed).permutation(len(dataset))[:count])


def repaired(options: argparse.Namespace, seed: int, patch: str, task: DownstreamTask, clean_inputs) -> dict:
    """The report of one repair, without what is the same in all."""
    folder = Path(options.implants) / f"bad_encoder-{seed}"
    trigger, implant = load_trigger(folder / "trigger-0"), loaded(folder, options.encoder)
    peft_config, learning_rate = None, options.learning_rate
    if patch != FULL:
        rank, alpha, rate = patch.split(":")
        peft_config, learning_rate = LoraConfig(r=int(rank), lora_alpha=int(alpha)), float(rate)
    model = type(implant.model).__name__
    with tempfile.TemporaryDirectory() as output_dir:
        trainer = MudjackingTrainer(
            model=implant.model,
            args=MudjackingConfig(
                output_dir=output_dir,
                seed=seed,
                max_steps=options.max_steps,
                learning_rate=learning_rate,
                stop_when_fixed=False,
                save_strategy="no",
                report_to="none",
                dataloader_pin_memory=torch.cuda.is_available(),
                disable_tqdm=options.disable_tqdm,
            ),
            bug_instances=[draw_bug_report(implant, task, trigger, seed)],
            train_dataset=clean_inputs,
            processing_class=implant.processing_class,
            peft_config=peft_config,
        )
        use_compact_progress(trainer)
        repair = measured_repair(
            trainer,
            task,
            true_trigger=trigger,
            clean_encoder=loaded(options.encoder, options.encoder),
            classifiers=("logistic",),
        )
        size = sum(path.stat().st_size for path in Path(output_dir).glob("*.safetensors"))
    return {
        "model": model,
        "seed": seed,
        "patch": patch,
        "weights_bytes": size,
        **repair.report,
        "locality": trainer.locality.mean,
    }


def main() -> None:
    options = parse_arguments()
    parts = [load_inputs(options.data, split) for split in ("train", "test")]
    clean_inputs = drawn(parts[0], options.inputs, seed=4).remove_columns("label")
    labelled = [LabelledInputs.from_dataset(drawn(part, options.task_inputs, seed=1)) for part in parts]
    task = DownstreamTask(*labelled, Path(options.data).name)
    output = Path(options.output)
    runs = json.loads(output.read_text(encoding="utf-8"))["runs"] if output.exists() else []
    for seed in options.seeds:
        for patch in (FULL, *options.adapters):
            if (seed, patch) not in [(run["seed"], run["patch"]) for run in runs]:
                runs.append(repaired(options, seed, patch, task, clean_inputs))
                write_json(output, {"runs": runs})
    table = Table(title="Percent: kept / retrained")
    for column in ("seed", "patch", "BA before", "ASR before", "BA", "ASR", "ASR-B", "RA", "locality", "kB"):
        table.add_column(column)
    for run in runs:
        before, after = run["before"]["kept"], run["after"]
        both = {n: f"{100 * after['kept'][n]:.1f} / {100 * after['retrained'][n]:.1f}" for n in ("BA", "ASR", "RA")}
        table.add_row(
            str(run["seed"]),
            run["patch"],
            f"{100 * before['BA']:.1f}",
            f"{100 * before['ASR']:.1f}",
            both["BA"],
            both["ASR"],
            f"{100 * run['clean']['ASR-B']:.1f}",
            both["RA"],
            f"{run['locality']:.4f}",
            f"{run['weights_bytes'] / 1000:.0f}",
        )
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
