# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""`mudjack invert`."""

from __future__ import annotations

import argparse

from .options import add_config, add_report, bugs_from, check_inputs, require, screener


HELP = "Find the trigger in a misclassified image or text and verify it on clean inputs; no weight is changed."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_report(parser)
    parser.add_argument("--output-dir", help="folder to write the trigger and a picture to")
    parser.add_argument("--inputs", type=int, default=32, help="clean inputs to verify on (default: 32)")
    parser.add_argument("--min-evidence", type=float, default=0.5, help="least evidence of a trigger (default: 0.5)")
    add_config(parser)


def run(options: argparse.Namespace) -> int:
    require(options, "model", "dataset", "output_dir")
    check_inputs(options)
    from pathlib import Path

    from accelerate import PartialState
    from rich.console import Console

    from ..evaluation.figures import plot_repair
    from ..loading import load_model, modality_of
    from ..output import check_output_dir, check_writable, staged
    from ..triggers.base import SUMMARY_FILE

    (bug,) = bugs_from(options)
    # What an earlier one wrote may be written over
    if not (Path(options.output_dir) / SUMMARY_FILE).is_file():
        check_output_dir(options.output_dir, options.model)
    check_writable(Path(options.output_dir))
    model = load_model(options.model).to(PartialState().device)
    modality = modality_of(model, bug.modality)
    screening = screener(options, model, modality)[-1](bug)
    found = screening.found
    with staged(Path(options.output_dir)) as staging:
        found.trigger.save_pretrained(staging)
        plot_repair(staging / "inversion.png", bug, found)
    console = Console(highlight=False)
    console.print(
        f"{'Verified' if screening.verified else 'NOT verified'}: evidence {found.evidence:.2f} (at least "
        f"{options.min_evidence} is needed), transfer {found.score:.2f}, clean content alone {found.control:.2f}, "
        f"{found.trigger.describe()}, {found.forwards + screening.forwards} forwards. Results are in {options.output_dir}/",
        markup=False,
    )
    if screening.verdict != "trigger":
        console.print(f"{screening.headline(bug)} {' '.join(screening.reasons)}", markup=False)
    if modality == "text":
        console.print(f"Trigger: {' … '.join(found.trigger.spans)}", markup=False)
    return 0 if screening.verified else 1
