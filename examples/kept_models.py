# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""Models that an earlier run of an example left, for the next one."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from accelerate import PartialState

from hf_mudjacking.output import write_json


def chosen(options: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Some of the options by their names."""
    return {name: getattr(options, name) for name in names}


def found(folder: Path, made_with: dict[str, Any]) -> bool:
    """Whether a model of an earlier run is there to be used again.

    Raises:
        ValueError: If it was made with something else.
    """
    note = folder / "_made_with.json"
    if not (folder / "config.json").exists():
        write_json(note, made_with)
        return False
    earlier = json.loads(note.read_text(encoding="utf-8")) if note.exists() else None
    if earlier != made_with:
        raise ValueError(
            f"The model in {folder} was made with {earlier}, not {made_with}. Choose another --output-dir, or remove it."
        )
    if PartialState().is_main_process:
        sys.stderr.write(f"Using the model in {folder}\n")
    return True
