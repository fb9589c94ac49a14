# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""`mudjack demo`."""

from __future__ import annotations

import argparse

from .options import add_config


HELP = (
    "Implant a backdoor in a small ViT on handwritten digits, or in a MiniLM, and repair it from one report; no network "
    "needed."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--modality", choices=["image", "text"], default="image", help="digits or sentences (default: image)"
    )
    parser.add_argument("--output-dir", default="demo_output", help="folder to write to (default: demo_output)")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything (default: 0)")
    add_config(parser)


def run(options: argparse.Namespace) -> int:

    from rich.console import Console

    from ..attacks import ImplantError
    from ..demo import run_demo
    from ..demo_text import run_text_demo
    from ..evaluation.report import report_lines, report_tables

    try:
        run = {"image": run_demo, "text": run_text_demo}[options.modality]
        repair = run(options.output_dir, options.seed, options.disable_tqdm)
    except ImplantError as error:
        raise ValueError(f"{error} Try another --seed.") from error
    console = Console(highlight=False)
    for table in report_tables(repair.report):
        console.print(table)
    for line in report_lines(repair.report):
        console.print(line, markup=False)
    console.print(f"Patched model, report.json and repair.png are in {options.output_dir}/", markup=False)
    return 0
