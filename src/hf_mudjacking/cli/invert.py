# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""`mudjack invert`."""

from __future__ import annotations

import argparse

from .options import add_config, add_report, bug_from, require


HELP = "Find the trigger in a misclassified image and verify it on clean inputs; no weight is changed."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_report(parser)
    parser.add_argument("--output-dir", help="folder to write the trigger and a picture to")
    parser.add_argument("--inputs", type=int, default=32, help="clean inputs to verify on (default: 32)")
    parser.add_argument("--min-transfer", type=float, default=0.25, help="least transfer of a trigger (default: 0.25)")
    add_config(parser)


def run(options: argparse.Namespace) -> int:
    require(options, "model", "dataset", "output_dir")
    from pathlib import Path

    from rich.console import Console

    from ..data import CleanInputs, load_inputs
    from ..encoder import Encoder, load_model, load_processor
    from ..evaluation.figures import plot_repair
    from ..inversion import invert_trigger
    from ..output import check_output_dir, staged

    bug = bug_from(options)
    check_output_dir(options.output_dir, options.model)
    dataset = load_inputs(options.dataset, options.split, options.streaming)
    if options.image_column != "image":
        dataset = dataset.rename_column(options.image_column, "image")
    inputs = CleanInputs(dataset, options.inputs, options.seed, "dataset")
    encoder = Encoder(
        load_model(options.model), load_processor(options.processor or options.model), options.feature_source
    )
    found = invert_trigger(encoder, bug, list(inputs), seed=options.seed, disable_tqdm=options.disable_tqdm)
    with staged(Path(options.output_dir)) as staging:
        found.trigger.save_pretrained(staging)
        plot_repair(staging / "inversion.png", bug, found)
    verified = found.score >= options.min_transfer
    Console(highlight=False).print(
        f"{'Verified' if verified else 'NOT verified'}: transfer {found.score:.3f} (at least {options.min_transfer} is "
        f"needed), {found.area:.1%} of the picture, {found.forwards} forwards. "
        f"Trigger and inversion.png are in {options.output_dir}/"
    )
    return 0 if verified else 1
