# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""`mudjack evaluate`."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from .options import Several, add_config, require


if TYPE_CHECKING:
    from ..evaluation.tasks import DownstreamTask


HELP = "Compare encoders with the one in use on labelled tasks; exit code 1 if one of them breaks a limit."
# Options, and the fields of `Limits` that they set
_LIMITS = {
    "max_asr": "highest ASR, classifier kept or retrained, of any trigger",
    "max_accuracy_drop": "most accuracy on clean inputs that may be lost, classifier kept or retrained",
    "min_robust_accuracy": "lowest accuracy on triggered inputs, classifier kept or retrained, of any trigger",
    "min_agreement": "smallest share of clean inputs that keep their prediction, classifier kept",
    "min_cosine": "lowest mean cosine of the features of clean inputs",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", help="Hub id or folder of the encoder in use; classifiers are trained on its features"
    )
    parser.add_argument(
        "--compare",
        nargs="+",
        action=Several,
        metavar="MODEL",
        help="ids or folders of encoders, or adapters, to compare",
    )
    parser.add_argument(
        "--tasks",
        nargs="+",
        action=Several,
        metavar="NAME=DATA",
        help="labelled tasks: NAME=DATA, a Hub id or folder with the splits train and test, or NAME=TRAIN,TEST, two sets, each "
        "a Hub id, .parquet file or folder",
    )
    parser.add_argument(
        "--trigger", metavar="FOLDER", help="folder of a trigger, or of a patch, whose triggers are taken"
    )
    parser.add_argument("--output", metavar="FILE", help="json file to write the report to")
    for name, text in _LIMITS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=float, metavar="RATE", help=f"{text} (0 to 1)")
    parser.add_argument(
        "--processor", help="Hub id or folder of the processor of all encoders (default: each one's own)"
    )
    parser.add_argument("--input-column", help="column of inputs of the labelled sets (default: image or text)")
    parser.add_argument("--label-column", default="label", help="their label column (default: label)")
    parser.add_argument("--classifier", default="logistic", choices=["logistic", "mlp"], help="(default: logistic)")
    parser.add_argument("--feature-source", default="auto", help="auto, cls, mean, pooler or projection")
    parser.add_argument("--seed", type=int, default=0, help="seed of the classifiers (default: 0)")
    add_config(parser)


def run(options: argparse.Namespace) -> int:
    require(options, "model", "compare", "tasks")
    from accelerate import PartialState
    from rich.console import Console

    from ..evaluation.comparison import BrokenLimit, Limits, compare_encoders, triggers_in
    from ..evaluation.report import comparison_tables
    from ..output import check_output_file, write_json

    limits = Limits(**{name: getattr(options, name) for name in _LIMITS})
    if options.output is not None:
        check_output_file(options.output)
    triggers = [] if options.trigger is None else triggers_in(options.trigger)
    report = compare_encoders(
        options.model,
        options.compare,
        [_task(text, options) for text in options.tasks],
        triggers,
        limits=limits,
        processor=options.processor,
        feature_source=options.feature_source,
        classifier=options.classifier,
        seed=options.seed,
        disable_tqdm=options.disable_tqdm,
    )
    # Of several processes one writes and prints
    first = PartialState().is_main_process
    console = Console(highlight=False, quiet=not first)
    for table in comparison_tables(report):
        console.print(table)
    for number, trigger in enumerate(report["triggers"]):
        console.print(f"Trigger {number}: {trigger['description']}", markup=False)
    if options.output is not None and first:
        write_json(options.output, report)
    for broken in report["broken"] if first else ():
        sys.stderr.write(f"{BrokenLimit(**broken)}\n")
    return 1 if report["broken"] else 0


def _task(text: str, options: argparse.Namespace) -> DownstreamTask:
    from ..evaluation.tasks import DownstreamTask
    from ..named_datasets import load_labelled

    name, _, data = text.partition("=")
    train, _, test = data.partition(",")
    if not name or not train or ("," in data and not test):
        raise ValueError(
            f"--tasks {text}: give NAME=DATA or NAME=TRAIN,TEST; in a YAML file the latter in quotes, where a list is split at commas"
        )
    parts = load_labelled(train, test or None)
    columns = {"input_column": options.input_column, "label_column": options.label_column}
    return DownstreamTask.from_datasets(*parts, name, **columns)
