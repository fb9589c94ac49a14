# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""`mudjack patch`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from .options import add_config, add_report, bugs_from, clean_inputs_from, require


if TYPE_CHECKING:
    from ..trainer import MudjackingTrainer


HELP = "Find the trigger in a bug report and patch it out of the encoder; the original checkpoint is not touched."
# On all linear layers of a ViT-B/16 that is 2.7 MB
_LORA_RANK = 4
# An adapter starts from nothing and has few weights: at the rate of full weights it moved clean features eight times as far
_LEARNING_RATE, _LORA_LEARNING_RATE = 3e-4, 3e-3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_report(parser, several=True)
    parser.add_argument("--output-dir", help="folder for the patched model")
    parser.add_argument(
        "--labelled-train", metavar="DATA", help="labelled set for a before-and-after table: train part"
    )
    parser.add_argument("--labelled-test", metavar="DATA", help="its test part")
    parser.add_argument(
        "--labelled-input-column", metavar="NAME", help="its column of inputs (default: --input-column)"
    )
    parser.add_argument("--label-column", default="label", help="its label column (default: label)")
    parser.add_argument(
        "--lora-rank",
        type=int,
        nargs="?",
        const=_LORA_RANK,
        metavar="RANK",
        help=f"make the patch a LoRA adapter of this rank, or of rank {_LORA_RANK} if none is named",
    )
    parser.add_argument("--max-steps", type=int, default=300, help="optimiser steps at most (default: 300)")
    parser.add_argument("--batch-size", type=int, default=32, help="clean inputs per step (default: 32)")
    parser.add_argument(
        "--learning-rate",
        type=float,
        help=f"peak learning rate (default: {_LEARNING_RATE:g}, of an adapter {_LORA_LEARNING_RATE:g})",
    )
    parser.add_argument("--locality-weight", type=float, default=1.0, help="weight of the locality loss")
    parser.add_argument(
        "--generalizability-weight", type=float, default=1.0, help="weight of the generalizability loss"
    )
    parser.add_argument(
        "--altered-triggers",
        type=int,
        default=32,
        help="altered versions of each trigger that are stamped (default: 32)",
    )
    parser.add_argument(
        "--reinversions", type=int, default=4, help="times the report is inverted anew while patching (default: 4)"
    )
    parser.add_argument(
        "--adversarial-levels",
        type=float,
        help="levels of 255 that stamped inputs are moved by towards the reported feature, so that less of the trigger is left, "
        "for more compute and some accuracy; 0 moves nothing (default: 2, and 0 for a small patch at its place as long as nothing more of it is found)",
    )
    parser.add_argument(
        "--latent-strength",
        type=float,
        default=0.6,
        help="of a report that is patched without a trigger, how much of it clean inputs carry inside the encoder (default: 0.6)",
    )
    parser.add_argument("--min-evidence", type=float, default=0.5, help="least evidence of a trigger (default: 0.5)")
    parser.add_argument(
        "--on-unverified",
        default="refuse",
        choices=["refuse", "patch", "skip"],
        help="a report that is not believed (see mudjack inspect): refuse to patch, patch it all the same, with its trigger where one "
        "was verified, or skip it (default: refuse)",
    )
    parser.add_argument(
        "--locality-budget",
        type=number_or_none,
        default=0.1,
        help="mean cosine distance that clean features may move by before all is rolled back, or none (default: 0.1)",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=0,
        help="processes that prepare pictures, of which a GPU needs eight or more to be kept busy (default: 0)",
    )
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast")
    parser.add_argument("--fp16", action="store_true", help="float16 autocast (GPU)")
    parser.add_argument(
        "--patch-scope", default="auto", help="auto, full, or trigger_tokens: for text, their embeddings alone"
    )
    parser.add_argument(
        "--save-steps", type=int, metavar="STEPS", help="keep a checkpoint every so many steps (default: none)"
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on from the newest checkpoint in the output folder that is whole"
    )
    add_config(parser)


def number_or_none(value: str | float) -> float | None:
    try:
        return None if str(value).lower() == "none" else float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{value!r} is neither a number nor `none`") from None


def run(options: argparse.Namespace) -> int:
    require(options, "model", "dataset", "output_dir")
    if (options.labelled_train is None) != (options.labelled_test is None):
        raise ValueError("--labelled-train and --labelled-test belong together")
    from ..output import not_left_empty

    # The trainer makes it, long before there is a patch
    with not_left_empty(options.output_dir):
        return _patch(options)


def _patch(options: argparse.Namespace) -> int:
    from pathlib import Path

    import torch
    from peft import LoraConfig
    from rich.console import Console

    from ..callbacks import use_compact_progress
    from ..config import MudjackingConfig
    from ..evaluation.figures import plot_repair
    from ..evaluation.repair import measured_repair
    from ..evaluation.report import report_lines, report_tables
    from ..evaluation.tasks import DownstreamTask
    from ..fingerprint import report_sha256
    from ..inversion import UnverifiedTriggerError
    from ..loading import load_model, load_processor, modality_of
    from ..locality_budget import LocalityBudgetError
    from ..named_datasets import load_labelled
    from ..output import check_output_dir, write_json
    from ..patch_record import read_record
    from ..trainer import MudjackingTrainer

    for name in ("lora_rank", "save_steps"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value}: it must be 1 or more")
    if options.workers < 0:
        raise ValueError(f"--workers {options.workers}: it must be 0 or more")
    check_output_dir(options.output_dir, options.model)
    # Of ours it is only beside a record
    earlier = read_record(options.output_dir)
    if earlier is None and (Path(options.output_dir) / "report.json").exists():
        raise ValueError(
            f"`{options.output_dir}` holds a `report.json` that hf-mudjacking did not write. Choose an empty folder: nothing "
            "foreign is ever overwritten."
        )
    learning_rate = options.learning_rate
    if learning_rate is None:
        learning_rate = _LEARNING_RATE if options.lora_rank is None else _LORA_LEARNING_RATE
    bugs = bugs_from(options)
    model = load_model(options.model)
    modality = modality_of(model, bugs[0].modality)
    dataset = clean_inputs_from(options, modality)
    task = None
    if options.labelled_train is not None:
        parts = load_labelled(options.labelled_train, options.labelled_test)
        column = options.labelled_input_column or options.input_column
        columns = {"input_column": column, "label_column": options.label_column}
        task = DownstreamTask.from_datasets(*parts, Path(options.labelled_test).stem, **columns)
        if task.modality != modality:
            raise ValueError(
                f"--labelled-test {options.labelled_test} holds {task.modality}s; the model takes {modality}s"
            )
    trainer = MudjackingTrainer(
        model=model,
        args=MudjackingConfig(
            output_dir=options.output_dir,
            seed=options.seed,
            max_steps=options.max_steps,
            per_device_train_batch_size=options.batch_size,
            learning_rate=learning_rate,
            locality_weight=options.locality_weight,
            generalizability_weight=options.generalizability_weight,
            min_evidence=options.min_evidence,
            on_unverified=options.on_unverified,
            altered_triggers=options.altered_triggers,
            reinversions=options.reinversions,
            adversarial_levels=options.adversarial_levels,
            latent_strength=options.latent_strength,
            locality_budget=options.locality_budget,
            feature_source=options.feature_source,
            patch_scope=options.patch_scope,
            bf16=options.bf16,
            fp16=options.fp16,
            use_cpu=not torch.accelerator.is_available(),
            save_strategy="no" if options.save_steps is None else "steps",
            save_steps=options.save_steps or 500,
            dataloader_num_workers=options.workers,
            dataloader_pin_memory=torch.cuda.is_available(),
            disable_tqdm=options.disable_tqdm,
        ),
        bug_instances=bugs,
        train_dataset=dataset,
        processing_class=load_processor(options.processor or options.model, model),
        peft_config=None
        if options.lora_rank is None
        else LoraConfig(r=options.lora_rank, lora_alpha=options.lora_rank),
    )
    use_compact_progress(trainer)
    # Of several processes one writes and prints
    first = trainer.is_world_process_zero()
    console = Console(highlight=False, quiet=not first)
    try:
        # A checkpoint holds the triggers
        if not options.resume:
            trainer.invert_triggers()
    except UnverifiedTriggerError as error:
        console.print(f"Nothing was patched. {error}", markup=False)
        return 1
    features = {}
    try:
        if task is None:
            trainer.train(resume_from_checkpoint=options.resume or None)
            trainer.save_model()
        else:
            repair = measured_repair(trainer, task, resume_from_checkpoint=options.resume or None)
    except LocalityBudgetError as error:
        console.print(f"Nothing was patched. {error}", markup=False)
        return 3
    if task is None and first:
        # That of a patch that was here before
        (Path(options.output_dir) / "report.json").unlink(missing_ok=True)
    if task is not None and first:
        features = {"before": repair.before, "after": repair.after, "labels": task.test.labels}
        write_json(Path(options.output_dir) / "report.json", repair.report)
        for table in report_tables(repair.report):
            console.print(table)
        for line in report_lines(repair.report):
            console.print(line, markup=False)
    picture = Path(options.output_dir) / "_repair.png"
    # A resumed run has not looked at its reports
    if first and trainer.inversions:
        plot_repair(picture, trainer.bug_instances[0], trainer.inversions[0], **features)
    elif first and (earlier or {}).get("bug_ids") != [report_sha256(bug) for bug in trainer.bug_instances]:
        # That of other reports
        picture.unlink(missing_ok=True)
    left = trainer.what_is_left()
    console.print(
        f"After {trainer.state.global_step} of {trainer.state.max_steps} steps{_moved(trainer)}:", markup=False
    )
    for each in left:
        console.print(f"  {each.describe()}", markup=False)
    if not all(each.repaired for each in left):
        console.print(
            "The bug is NOT repaired: what is saved needs more steps (--max-steps) or a higher learning rate (--learning-rate).",
            markup=False,
        )
    console.print(f"The patched model is in {options.output_dir}/ and loads with {_loader(options)}.", markup=False)
    return 0


def _moved(trainer: MudjackingTrainer) -> str:
    return (
        "" if trainer.locality is None else f", clean inputs moved by a cosine distance of {trainer.locality.mean:.4f}"
    )


def _loader(options: argparse.Namespace) -> str:
    from ..loading import class_that_loads

    loader = f"{class_that_loads(options.output_dir).__name__}.from_pretrained"
    return loader if options.lora_rank is None else f"{loader}, which takes {options.model} with it"
