# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""`mudjack apply`."""

from __future__ import annotations

import argparse

from .options import add_config, require


HELP = "Apply a patch (full weights, LoRA adapter or delta) to the model it belongs to; neither of them is written to."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("patch", metavar="PATCH", help="Hub id or folder of the patch")
    parser.add_argument("--to", metavar="MODEL", help="Hub id or folder of the unpatched model")
    parser.add_argument("--output-dir", help="folder for the patched model")
    parser.add_argument("--keep-adapter", action="store_true", help="do not merge a LoRA adapter")
    add_config(parser)


def run(options: argparse.Namespace) -> int:
    require(options, "to", "output_dir")
    from rich.console import Console

    from ..loading import class_that_loads
    from ..patches import apply_patch

    record = apply_patch(options.patch, options.to, options.output_dir, options.keep_adapter)
    Console(highlight=False).print(
        f"The patched model is in {options.output_dir}/ and loads with {class_that_loads(options.output_dir).__name__}.from_pretrained. "
        f"Its base was {options.to}, sha256 {record['base_weights_sha256']}, as the patch wants it.",
        markup=False,
    )
    return 0
