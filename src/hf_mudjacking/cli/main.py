# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""`mudjack COMMAND`: parse, run, and turn errors into messages and exit codes.

Exit codes: 0 done; 1 no trigger was verified (`inspect`: in at least one report), so nothing was patched, or (`evaluate`) a
limit is broken, or (`benchmark`) a cell failed; 2 the input cannot be used, or a patch does not belong to the model; 3 the patch moved clean inputs further
than `--locality-budget` and was rolled back; 4 the Hub did not take the patch, which is whole on disk; 70 an error that is not known,
with its traceback; 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
import warnings
from collections.abc import Sequence

from .. import __version__
from . import apply, benchmark, demo, diff, env, evaluate, inspect, invert, patch, push, revert
from .options import apply_config_file


COMMANDS = {
    "demo": demo,
    "inspect": inspect,
    "invert": invert,
    "patch": patch,
    "apply": apply,
    "revert": revert,
    "diff": diff,
    "evaluate": evaluate,
    "push": push,
    "benchmark": benchmark,
    "env": env,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="mudjack", description="Repair a backdoored foundation model after one bug report."
    )
    parser.add_argument("--version", action="version", version=f"hf-mudjacking {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    parsers = {}
    for name, module in COMMANDS.items():
        # A config file is looked for by the whole name of its option
        parsers[name] = subparsers.add_parser(name, help=module.HELP, description=module.HELP, allow_abbrev=False)
        module.add_arguments(parsers[name])
    if arguments and arguments[0] in parsers:
        apply_config_file(parsers[arguments[0]], arguments[1:])
    options = parser.parse_args(arguments)
    if vars(options).get("seed", 0) < 0:
        parsers[options.command].error(f"--seed {options.seed}: a seed is 0 or more")
    # Tables and messages are what this command prints; libraries speak up only when something is wrong.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # PEFT asks transformers for what it will rename
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    if vars(options).get("disable_tqdm"):
        _silence()
    try:
        return COMMANDS[options.command].run(options)
    except (ValueError, TypeError, OSError, ImportError) as error:
        sys.stderr.write(f"mudjack {options.command}: error: {error}\n")
        return 2
    except KeyboardInterrupt:
        goes_on = "; with --resume it goes on from the last checkpoint" if vars(options).get("save_steps") else ""
        sys.stderr.write(f"mudjack {options.command}: interrupted{goes_on}\n")
        return 130
    except Exception:
        # 1 is an answer
        traceback.print_exc()
        return 70


def _silence() -> None:
    """Switch off the bars of the libraries that load models and data; those of this one are asked by name."""
    import datasets
    import huggingface_hub.utils
    from transformers.utils import logging

    datasets.disable_progress_bars()
    huggingface_hub.utils.disable_progress_bars()
    logging.disable_progress_bar()
