# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""Running a plan: cells that are there are kept, the others run in processes of their own."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from .case import IMPLANTS_FOLDER
from .plan import BenchmarkPlan, Cell
from .sources import check_data


@dataclass(frozen=True)
class Failure:
    """A job that ended without its result.

    Args:
        job (`str`): What it was.
        message (`str`): The last lines that its process said.
    """

    job: str
    message: str


def run_benchmark(
    plan: BenchmarkPlan, processes: int = 1, implants_only: bool = False, disable_tqdm: bool = False
) -> list[Failure]:
    """Run all cells of a plan that are not there yet.

    First encoders, then implants, then cells: what several cells share is made once. A failed cell stops no other;
    starting again goes on where it ended.

    Args:
        plan (`BenchmarkPlan`): The plan.
        processes (`int`, *optional*, defaults to 1): Cells at a time; processor cores are shared out among them
            unless `OMP_NUM_THREADS` is set.
        implants_only (`bool`, *optional*, defaults to `False`): Whether to stop before the cells.
        disable_tqdm (`bool`, *optional*, defaults to `False`): Whether to hide the progress bar.

    Returns:
        `list[Failure]`: What failed.

    Raises:
        ValueError: If a cell in the output folder was made with other settings, or the data of a task cannot be loaded.
    """
    missing = missing_cells(plan)
    if missing:
        # Else every job would find out for itself that there is no data
        check_data(plan)
    plan_file = plan.write()
    trained = [name for name, encoder in plan.encoders.items() if encoder.model is None]
    encoders = dict.fromkeys((cell.encoder,) for cell in missing if cell.encoder in trained)
    implants = dict.fromkeys(
        (cell.encoder, cell.attack, str(cell.seed))
        for cell in missing
        if not (Path(plan.output_dir) / IMPLANTS_FOLDER / cell.case / "implant.json").exists()
    )
    cells = [] if implants_only else [(cell.encoder, cell.attack, str(cell.seed), cell.method) for cell in missing]
    failures: list[Failure] = []
    total = len(encoders) + len(implants) + len(cells)
    with tqdm(total=total, disable=disable_tqdm, desc="Benchmark", unit="job") as bar:
        for jobs in (encoders, implants, cells):
            failures += _run_jobs(plan_file, list(jobs), processes, bar)
    return failures


def missing_cells(plan: BenchmarkPlan) -> list[Cell]:
    """Cells that have no json yet.

    Raises:
        ValueError: If one was made with other settings than the plan's.
    """
    missing = []
    for cell in plan.cells():
        path = cell.path(plan.output_dir)
        if not path.exists():
            missing.append(cell)
            continue
        there, wanted = read_cell(path)["settings"], plan.settings_of(cell)
        different = sorted(name for name in there.keys() | wanted.keys() if there.get(name) != wanted.get(name))
        if different:
            name = different[0]
            raise ValueError(
                f"`{path}` was made with other settings: `{name}` was {there.get(name)!r}, the plan says {wanted.get(name)!r}. "
                "Remove that file, give the method another name, or take another output folder."
            )
    return missing


def read_cell(path: Path) -> dict[str, Any]:
    """The json of a cell.

    Raises:
        ValueError: If the file is none.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        content["settings"], content["method"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"`{path}` is not the json of a cell ({error!r}). If it is of a benchmark, remove it, and it is run again."
        ) from error
    return content


def read_cells(folder: str | Path) -> list[dict[str, Any]]:
    """All cells under a folder, in the order of their names, and of the numbers in them: 100 comes before 1200.

    Raises:
        ValueError: If a file in it is no cell.
    """
    folder = Path(folder)
    paths = [path for path in folder.rglob("*.json") if path.parent != folder]
    return [read_cell(path) for path in sorted(paths, key=lambda path: _in_order(str(path.relative_to(folder))))]


def _in_order(name: str) -> list[tuple[float, str]]:
    """A name as what it is sorted by: numbers by their value, before words."""
    parts = re.split(r"(\d+(?:\.\d+)?)", name.removesuffix(".json"))
    return [(float(part), "") if i % 2 else (math.inf, part) for i, part in enumerate(parts)]


def _run_jobs(plan_file: Path, jobs: Iterable[Sequence[str]], processes: int, bar: tqdm) -> list[Failure]:
    threads = max((os.cpu_count() or 1) // processes, 1)
    environment = {"OMP_NUM_THREADS": str(threads), **os.environ, "TRANSFORMERS_VERBOSITY": "error"}

    def run(job: Sequence[str]) -> Failure | None:
        command = [sys.executable, "-m", "hf_mudjacking.benchmark.run_cell", str(plan_file), *job]
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment)
        if done.returncode == 0:
            return None
        said = "\n".join(done.stderr.strip().splitlines()[-6:])
        return Failure(" ".join(job), said or f"killed by signal {-done.returncode}")

    failures = []
    with ThreadPoolExecutor(max_workers=processes) as pool:
        futures = [pool.submit(run, job) for job in jobs]
        try:
            for future in as_completed(futures):
                failure = future.result()
                if failure is not None:
                    failures.append(failure)
                bar.update()
        except KeyboardInterrupt:
            # Those at work were interrupted too; those that wait must not begin
            pool.shutdown(cancel_futures=True)
            raise
    return failures
