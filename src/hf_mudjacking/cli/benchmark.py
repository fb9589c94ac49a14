# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""`mudjack benchmark`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import yaml

from .options import Several, add_config, require


HELP = (
    "Implant attacks, repair them with this library and with other defences, and put rates and costs in one table. Cells that "
    "are there are kept, so that it goes on where it ended."
)
# Ten minutes on two cores, without a network.
_QUICK: dict[str, Any] = {
    "output_dir": "benchmark_quick",
    "tasks": {"digits": {"dataset": "digits", "train": 1200, "test": 597}},
    "encoders": {
        "digits-vit": {
            "model_type": "vit",
            "config": {
                "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 128,
                "image_size": 16, "patch_size": 4,
            },
            "image_size": 16,
            "training": {"epochs": 60, "batch_size": 64, "crop_padding": 1},
        }
    },
    "attacks": ["bad_encoder"],
    "methods": {
        "none": {},
        "mudjacking": {"measure_at": [10, 30, 100, 190]},
        "oracle_trigger": {},
        "effectiveness_alone": {},
        "no_locality": {},
        "no_generalizability": {},
        "official": {"epochs": 40, "measure_at": [4, 12, 40, 80, 160]},
        # Rates and temperature: the best of those tried on this encoder
        "clean_fine_tuning": {"learning_rate": 1e-4, "temperature": 0.5, "epochs": 5},
        "nad": {
            "learning_rate": 1e-4, "temperature": 0.5, "epochs": 3, "teacher_learning_rate": 1e-3, "teacher_epochs": 5,
        },
        "ft_sam": {"rho": 0.1, "learning_rate": 1e-2, "temperature": 0.5, "batch_size": 64, "epochs": 3},
        "ssl_cleanse": {"rounds": 50, "batch_size": 128, "max_steps": 60},
    },
    "shadow_inputs": 1200,
    "clean_inputs": 1200,
    "check_inputs": 597,
    "classifiers": ["logistic", "mlp"],
}  # fmt: skip
_PLAN = ("tasks", "encoders", "methods", "sweeps", "implant")
_SIZES = ("shadow_inputs", "clean_inputs", "check_inputs")


def mapping_or_list(value: Any) -> Any:
    """A nested option: as YAML on the command line, as it is from the config file."""
    try:
        parsed = yaml.safe_load(value) if isinstance(value, str) else value
    except yaml.YAMLError as error:
        raise argparse.ArgumentTypeError(f"{value!r} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(parsed, (dict, list)):
        raise argparse.ArgumentTypeError(
            f"{value!r} is neither a mapping nor a list in YAML, such as `[none, mudjacking]`"
        )
    return parsed


class Picked(argparse.Action):
    """A nested option; on the command line, a list of names picks among what the config file says, with the settings there."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        setattr(namespace, self.dest, picked(values, self.default))


def picked(given: Any, among: Any) -> Any:
    """The entries of a mapping that are listed, one that it lacks without settings; what is given, where it is no list."""
    if not isinstance(given, list) or not isinstance(among, dict):
        return given
    return {name: among.get(name) for name in map(str, given)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--quick", action="store_true", help="a small plan on handwritten digits: seven minutes on two cores"
    )
    parser.add_argument("--output-dir", help="folder of encoders, implants and cells")
    for name, meaning in (
        (
            "tasks",
            "downstream tasks by name: dataset, train, test, …; reports come from the first; a list picks the config file's",
        ),
        (
            "encoders",
            "clean encoders by name: model, or model_type, config, image_size, training; a list picks the config file's",
        ),
        (
            "methods",
            "methods by name, with their settings; a list picks the config file's, or takes them as they come",
        ),
        ("sweeps", "variants of mudjacking by setting: a list of values"),
        ("implant", "settings of the attacks: steps, learning_rate, …"),
    ):
        parser.add_argument(f"--{name}", type=mapping_or_list, action=Picked, metavar="YAML", help=meaning)
    for name, meaning in (
        ("attacks", "names in the zoo"),
        ("seeds", "seeds (default: 0)"),
        ("classifiers", "logistic, mlp (default: logistic); the first gives the main figures"),
    ):
        parser.add_argument(f"--{name}", nargs="+", action=Several, metavar="NAME", help=meaning)
    for name in _SIZES:
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, metavar="N", help="see the plan")
    parser.add_argument("--implants-only", action="store_true", help="train encoders and implant attacks, no more")
    parser.add_argument("--altered", action="store_true", help="measure altered triggers too")
    parser.add_argument("--processes", type=int, default=1, help="cells at a time (default: 1)")
    parser.add_argument(
        "--tables",
        metavar="FOLDER",
        help="run nothing: print the tables of the cells in a folder, and draw their pictures",
    )
    add_config(parser)


def run(options: argparse.Namespace) -> int:
    from rich.console import Console

    from ..benchmark import BenchmarkPlan, benchmark_tables, read_cells, run_benchmark
    from ..benchmark.plan import CELLS_FOLDER
    from ..patch_record import read_record

    console = Console(highlight=False, soft_wrap=True)
    failures = []
    if options.tables is None:
        if options.processes < 1:
            raise ValueError(f"--processes {options.processes}: at least one is needed")
        plan = BenchmarkPlan.from_values(_values(options))
        failures = run_benchmark(plan, options.processes, options.implants_only, options.disable_tqdm)
        folder = Path(plan.output_dir)
        wanted = {cell.path(folder) for cell in plan.cells()}
        cells = [cell for cell in read_cells(folder / CELLS_FOLDER) if _path(cell, folder) in wanted]
    else:
        folder = Path(options.tables)
        if read_record(folder) is not None:
            raise ValueError(f"--tables {folder}: there is a patch; give the folder that a benchmark wrote")
        # The folder of a benchmark holds encoders and implants besides
        cells = read_cells(folder / CELLS_FOLDER if (folder / CELLS_FOLDER).is_dir() else folder)
        if not cells:
            raise ValueError(f"--tables {folder}: there is no json of a cell under it")
    for line in benchmark_tables(cells):
        console.print(line, markup=False)
    _draw(folder, cells, console)
    for failure in failures:
        console.print(f"Failed: {failure.job}\n{failure.message}", markup=False, style="red")
    return 1 if failures else 0


def _values(options: argparse.Namespace) -> dict[str, Any]:
    """The plan that the options make, over the quick one if that is asked for."""
    given = {
        name: getattr(options, name) for name in ("output_dir", *_PLAN, "attacks", "seeds", "classifiers", *_SIZES)
    }
    if given["seeds"] is not None:
        try:
            given["seeds"] = [int(seed) for seed in given["seeds"]]
        except ValueError as error:
            raise ValueError(f"--seeds {' '.join(given['seeds'])}: whole numbers are needed") from error
    start = _QUICK if options.quick else {}
    values = {**start, **{name: picked(value, start.get(name)) for name, value in given.items() if value is not None}}
    if options.altered:
        values["altered"] = True
    if not options.quick:
        require(options, "output_dir", "tasks", "encoders", "attacks", "methods")
    return values


def _path(cell: dict[str, Any], folder: Path) -> Path:
    from ..benchmark import Cell

    return Cell(cell["encoder"], cell["attack"], cell["seed"], cell["method"]).path(folder)


def _draw(folder: Path, cells: list[dict[str, Any]], console: Any) -> None:
    from ..benchmark.plots import plot_benchmark

    pictures = plot_benchmark(folder, cells)
    if pictures:
        console.print(f"Pictures: {', '.join(map(str, pictures))}", markup=False)
