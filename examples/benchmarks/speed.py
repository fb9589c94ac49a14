# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""What makes patching fast: each part with it and without it, on CPU.

    python examples/benchmarks/speed.py --data path/to/cifar10 --output docs/results/speed.json
    python examples/benchmarks/speed.py --table --output docs/results/speed.json

Parts, chosen with `--only`; each is written as soon as it is there, and those that are not run keep their last result:

- `steps`: the step of this library with one thing left out at a time, and the step as the released code describes it.
- `optimisers`: steps until the same cosines with AdamW and cosine decay, and with the published SGD.
- `early_stop`: `stop_when_fixed`.
- `layers_vit`, `layers_resnet`: the last layers alone, and LoRA of several ranks, against quality.
- `data`: share of a step that decodes, stamps and preprocesses, in the first epoch and in later ones.
- `precision`: `bf16=True` and `torch_compile=True`.
- `inversion`: forward passes of an inversion at 224 pixels.

Times are CPU seconds of one thread, children such as compilers included, the median of at least three repeats.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import speed_inversion
import speed_repairs
import speed_steps
import torch

from hf_mudjacking.evaluation.report import library_versions
from hf_mudjacking.output import write_json


PARTS = {
    "steps": speed_steps.steps,
    "data": speed_steps.data,
    "precision": speed_steps.precision,
    "optimisers": speed_repairs.optimisers,
    "early_stop": speed_repairs.early_stop,
    "layers_vit": speed_repairs.layers_vit,
    "layers_resnet": speed_repairs.layers_resnet,
    "inversion": speed_inversion.inversion,
}
# Parts that repair, and what differs between their runs
KEYS = {
    "early_stop": "stop_when_fixed",
    "layers_vit": "patched",
    "layers_resnet": "patched",
    "optimisers": "optimiser",
}
# Of `--quick`: enough to see that all runs, too little to measure anything.
QUICK = {"seeds": [0], "steps": 4, "sgd_steps": 4, "ranks": [1], "repeats": 1, "small": True}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default="outputs/speed.json", help="json file (default: outputs/speed.json)")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts (default: all)")
    parser.add_argument("--data", help="CIFAR-10 (Hub id, parquet file or folder) for `data`")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1], help="of repairs and reports (default: 0 1)")
    parser.add_argument("--steps", type=int, default=300, help="steps of a repair (default: 300)")
    parser.add_argument("--sgd-steps", type=int, default=4000, help="most steps of the published SGD (default: 4000)")
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 4, 16], help="of LoRA (default: 1 4 16)")
    parser.add_argument("--repeats", type=int, default=3, help="of each time (default: 3)")
    parser.add_argument("--quick", action="store_true", help="the smallest run of the parts, which measures nothing")
    parser.add_argument("--table", action="store_true", help="print the tables of `--output`, and run nothing")
    options = parser.parse_args(arguments)
    options.small = False
    if options.quick:
        vars(options).update(QUICK)
    needs_data = "data" in options.only and not options.table
    if needs_data and options.data is None:
        parser.error("pictures are needed: pass `--data uoft-cs/cifar10`, a parquet file or a folder.")
    return options


def table(result: dict[str, Any]) -> str:
    """The rows of all parts, then quality by what is patched, as Markdown."""
    lines = ["| What | With | Without | Ratio | Unit | Model | Batch | Seed |", "|---|---|---|---|---|---|---|---|"]
    for part in PARTS:
        for row in result["parts"].get(part, {}).get("rows", []):
            without = f"> {row['unreached']}" if "unreached" in row else _number(row["without"])
            ratio = "not reached" if row["ratio"] is None else f"{'> ' * ('unreached' in row)}{row['ratio']:.2f}"
            lines.append(
                f"| {row['what']} | {_number(row['with'])} | {without} | {ratio} | {row['unit']} | {row['model']} | "
                f"{row['batch']} | {row['seed']} |"
            )
    for part, key in KEYS.items():
        runs = result["parts"].get(part, {}).get("runs", [])
        if not runs:
            continue
        lines += ["", f"Repairs of `{part}`, kept / retrained classifier, percent:", ""]
        lines += [
            f"| {key} | Model | Seed | Parameters | Steps | BA before | BA | ASR | RA | Locality distance |",
            "|---" * 10 + "|",
        ]
        for run in runs:
            rates = [f"{100 * run['kept'][n]:.1f} / {100 * run['retrained'][n]:.1f}" for n in ("BA", "ASR", "RA")]
            lines.append(
                f"| {run[key]} | {run['model']} | {run['seed']} | {run['parameters']:,} | {run['steps']} | "
                f"{100 * run['before']['BA']:.1f} | {' | '.join(rates)} | {_number(run['locality_distance'])} |"
            )
    return "\n".join(lines)


def _number(value: float | None) -> str:
    if value is None:
        return "none"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    output = Path(options.output)
    result = json.loads(output.read_text(encoding="utf-8")) if output.exists() else {"parts": {}}
    if options.table:
        sys.stdout.write(table(result) + "\n")
        return 0
    torch.set_num_threads(1)
    for part in options.only:
        sys.stderr.write(f"{part} ...\n")
        settings = {name: getattr(options, name) for name in ("seeds", "steps", "sgd_steps", "repeats")}
        result["parts"][part] = {**PARTS[part](options), "settings": settings}
        result["measured"] = (
            "CPU seconds of one thread on a shared x86-64 server with AVX2 and without bf16 arithmetic"
        )
        write_json(output, {**result, "versions": library_versions()})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
