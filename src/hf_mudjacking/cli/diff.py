# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""`mudjack diff`."""

from __future__ import annotations

import argparse

from .options import add_config


HELP = "Show which tensors differ between two models or adapters, and by how much; write a delta of them on request."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("first", metavar="A", help="Hub id or folder of the first model, or adapter")
    parser.add_argument("second", metavar="B", help="Hub id or folder of the second")
    parser.add_argument("--json", metavar="FILE", help="write the numbers to a file as well")
    parser.add_argument("--output-dir", help="write a delta that leads from A to B into this folder")
    add_config(parser)


def run(options: argparse.Namespace) -> int:
    from rich.console import Console

    from ..differences import compare_models, difference_table
    from ..output import check_output_file, write_json
    from ..patches import save_delta

    if options.json is not None:
        check_output_file(options.json)
    difference = compare_models(options.first, options.second)
    console = Console(highlight=False)
    console.print(difference_table(difference))
    for place, names in ((options.first, difference.only_first), (options.second, difference.only_second)):
        if names:
            console.print(f"Only in {place}: {', '.join(names)}", markup=False)
    if options.json is not None:
        write_json(options.json, difference.record())
    if options.output_dir is not None:
        save_delta(options.first, options.second, options.output_dir)
        console.print(f"The delta is in {options.output_dir}/", markup=False)
    return 0
