# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""Does a LoRA adapter repair as well as full weights? The example `patch_vit.py`, both ways from the same implants.

    python examples/benchmarks/lora.py --encoder outputs/patch_vit/clean_encoder --output outputs/lora.json

For each seed one implant and one report, patched with full weights and with adapters of each rank; `rank:learning rate:alpha`
names an adapter. Runs that are there are not repeated. Rates are those of `report.json`, with the classifier kept and retrained.
Options that are not known here go to the example (`--implant-steps`, `--test-inputs`, ...).
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from hf_mudjacking.evaluation.report import library_versions
from hf_mudjacking.output import write_json


EXAMPLE = Path(__file__).parents[1] / "patch_vit.py"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--encoder", required=True, help="folder of the clean encoder")
    parser.add_argument("--pretraining", default="uoft-cs/cifar10", help="Hub id or folder (default: uoft-cs/cifar10)")
    parser.add_argument("--downstream", default="tanganke/gtsrb", help="Hub id or folder (default: tanganke/gtsrb)")
    parser.add_argument("--output", default="outputs/lora.json")
    parser.add_argument("--work-dir", default="outputs/lora", help="folder for implants and patches")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--adapters", nargs="+", default=["4:3e-3:4"], metavar="RANK:LR:ALPHA")
    parser.add_argument("--max-steps", type=int, default=300, help="patching steps (default: 300)")
    options, options.further = parser.parse_known_args()
    return options


def repaired(options: argparse.Namespace, seed: int, adapter: str | None) -> dict:
    """The report of one repair."""
    folder = Path(options.work_dir) / f"{seed}-{'full' if adapter is None else adapter.replace(':', '-')}"
    full = Path(options.work_dir) / f"{seed}-full"
    if not (folder / "patched" / "report.json").exists():
        if adapter is not None:
            shutil.copytree(full / "backdoored_encoder", folder / "backdoored_encoder", dirs_exist_ok=True)
        command = [sys.executable, str(EXAMPLE), "--output-dir", str(folder), "--encoder", options.encoder]
        command += ["--pretraining", options.pretraining, "--downstream", options.downstream, "--seed", str(seed)]
        command += ["--max-steps", str(options.max_steps), "--disable-tqdm", *options.further]
        if adapter is not None:
            rank, learning_rate, alpha = adapter.split(":")
            command += ["--lora-rank", rank, "--learning-rate", learning_rate, "--lora-alpha", alpha]
        subprocess.run(command, check=True)
    report = json.loads((folder / "patched" / "report.json").read_text(encoding="utf-8"))
    size = sum(path.stat().st_size for path in (folder / "patched").glob("*.safetensors"))
    return {"patch": adapter or "full weights", "seed": seed, "weights_bytes": size, **report}


def main() -> None:
    options = parse_arguments()
    rows = [repaired(options, seed, adapter) for seed in options.seeds for adapter in (None, *options.adapters)]
    table = Table(title="Percent: kept / retrained")
    for column in ("seed", "patch", "BA before", "ASR before", "BA", "ASR", "RA", "kB"):
        table.add_column(column)
    for row in rows:
        before, after = row["before"]["kept"], row["after"]
        table.add_row(
            str(row["seed"]),
            row["patch"],
            f"{100 * before['BA']:.1f}",
            f"{100 * before['ASR']:.1f}",
            *(f"{100 * after['kept'][n]:.1f} / {100 * after['retrained'][n]:.1f}" for n in ("BA", "ASR", "RA")),
            f"{row['weights_bytes'] / 1000:.0f}",
        )
    Console().print(table)
    settings = {"max_steps": options.max_steps, "further": options.further}
    write_json(options.output, {"settings": settings, "runs": rows, "versions": library_versions()})


if __name__ == "__main__":
    main()
