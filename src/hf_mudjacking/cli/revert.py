# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""`mudjack revert`."""

from __future__ import annotations

import argparse

from .options import add_config, require


HELP = "Take a patch back: write the unpatched model again, to the last bit, verified by its hash."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("patched", metavar="PATCHED", help="Hub id or folder of the patched model")
    parser.add_argument("--patch", help="Hub id or folder of the patch")
    parser.add_argument("--base-model", metavar="MODEL", help="where the unpatched model is now, if it was moved")
    parser.add_argument("--output-dir", help="new folder for the unpatched model")
    add_config(parser)


def run(options: argparse.Namespace) -> int:
    require(options, "patch", "output_dir")
    from rich.console import Console

    from ..patches import revert_patch

    revert_patch(options.patched, options.patch, options.output_dir, options.base_model)
    Console(highlight=False).print(f"The unpatched model is in {options.output_dir}/", markup=False)
    return 0
