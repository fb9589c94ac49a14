# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""`mudjack inspect`."""

from __future__ import annotations

import argparse
import itertools
import re
from pathlib import Path

from .options import add_config, add_report, bugs_from, check_inputs, require, screener


# Of a report in the name of a file; file systems allow 255 bytes.
_LONGEST_NAME = 60
HELP = "Judge bug reports before anything is patched: a verdict on each, with its evidence; no weight is changed."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_report(parser, several=True)
    parser.add_argument("--output-dir", help="folder for screening.json and a picture of each report")
    parser.add_argument("--inputs", type=int, default=32, help="clean inputs to verify on (default: 32)")
    parser.add_argument("--min-evidence", type=float, default=0.5, help="least evidence of a trigger (default: 0.5)")
    parser.add_argument("--true-trigger", metavar="FOLDER", help="the attacker's trigger, when it is known, to draw")
    add_config(parser)


def run(options: argparse.Namespace) -> int:
    require(options, "model", "dataset", "output_dir")
    check_inputs(options)
    from accelerate import PartialState
    from rich.console import Console

    from ..evaluation.figures import plot_inspection
    from ..evaluation.report import screening_table
    from ..loading import load_model, modality_of
    from ..output import check_output_dir, staged, write_json
    from ..screening import transfer_by_size
    from ..triggers import load_trigger

    bugs = bugs_from(options)
    check_output_dir(options.output_dir, options.model)
    true_trigger = None if options.true_trigger is None else load_trigger(options.true_trigger)
    model = load_model(options.model).to(PartialState().device)
    modality = modality_of(model, bugs[0].modality)
    if true_trigger is not None and true_trigger.modality != modality:
        raise ValueError(
            f"--true-trigger {options.true_trigger}: it is of kind {true_trigger.kind}, not for {modality}s"
        )
    encoder, inputs, screened = screener(options, model, modality)
    names = _file_names([bug.name for bug in bugs])
    screenings, refused = {}, {}
    with staged(Path(options.output_dir), replaces=_pictures_from_before(Path(options.output_dir))) as staging:
        for name, bug in zip(names, bugs, strict=True):
            try:
                if bug.modality != modality:
                    raise ValueError(f"its inputs are of kind {bug.modality}, and `{options.model}` takes {modality}s")
                screening = screened(bug)
            except ValueError as error:
                # The verdicts on the others stand
                if len(bugs) == 1:
                    raise
                refused[name] = str(error)
                continue
            curve = transfer_by_size(encoder, bug, screening.found, inputs) if modality == "image" else []
            plot_inspection(staging / f"inspection-{name}.png", bug, screening, curve, true_trigger)
            screenings[name] = screening
        records = [
            {
                "name": name,
                **screening.record(),
                "reasons": screening.reasons,
                "trigger": screening.found.trigger.summary(),
                "forwards": screening.found.forwards + screening.forwards,
            }
            for name, screening in screenings.items()
        ]
        records += [{"name": name, "verdict": None, "reasons": [reason]} for name, reason in refused.items()]
        write_json(staging / "screening.json", {"min_evidence": options.min_evidence, "reports": records})
    console = Console(highlight=False)
    for name, screening in screenings.items():
        console.print(screening_table(name, screening))
    for name, reason in refused.items():
        console.print(f"{name} cannot be judged: {reason}", markup=False)
    console.print(f"Results are in {options.output_dir}/", markup=False)
    believed = all(screening.verdict == "trigger" for screening in screenings.values())
    return 0 if believed and not refused else 1


def _file_names(names: list[str]) -> list[str]:
    """Names that can stand in a file's name, each once."""
    plain = ["".join(c if c.isalnum() or c in "-_" else "-" for c in name)[:_LONGEST_NAME] for name in names]
    found: list[str] = []
    for i, name in enumerate(plain):
        candidates = itertools.chain([name] * (plain.count(name) == 1), (f"{name}-{n}" for n in itertools.count(i)))
        found.append(next(each for each in candidates if each not in found))
    return found


def _pictures_from_before(folder: Path) -> tuple[str, ...]:
    """Pictures of the reports that were judged into a folder before; others with such names are somebody's own."""
    from ..safe_loading import read_json

    try:
        reports = read_json(folder / "screening.json")["reports"]
        names = [report.get("name") for report in reports if isinstance(report, dict)]
    except (ValueError, KeyError, TypeError):
        return ()
    return tuple(f"inspection-{name}.png" for name in names if isinstance(name, str) and re.fullmatch(r"[\w-]+", name))
