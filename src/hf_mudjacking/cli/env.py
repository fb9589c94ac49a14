# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""`mudjack env`."""

from __future__ import annotations

import argparse
import platform


HELP = "Print the versions and devices that a bug report about this library needs."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def run(options: argparse.Namespace) -> int:
    import torch
    from rich.console import Console

    from ..evaluation.report import library_versions

    accelerator = torch.accelerator.current_accelerator()
    facts = {
        "platform": platform.platform(),
        "python": platform.python_version(),
        **library_versions(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else str(accelerator).lower(),
        "threads": str(torch.get_num_threads()),
    }
    console = Console(highlight=False)
    for name, value in facts.items():
        console.print(f"- {name}: {value}", markup=False)
    return 0
