# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""One job of a benchmark in a process of its own: `python -m hf_mudjacking.benchmark.run_cell PLAN JOB`.

A job is `ENCODER` (train it), `ENCODER ATTACK SEED` (implant it) or `ENCODER ATTACK SEED METHOD` (the cell). In a process of
its own, peak memory is that of the cell, and one that is killed takes no other with it.
"""

from __future__ import annotations

import sys
from typing import Any

import torch

from ..attacks import ImplantError
from ..evaluation.figures import plot_repair
from ..evaluation.repair import peak_memory_mb
from ..evaluation.report import library_versions
from ..output import write_json
from .case import Case
from .methods import repair
from .plan import BenchmarkPlan, Cell
from .rates import altered_rates, case_rates
from .sources import Sources


def main(arguments: list[str]) -> None:
    """Run the job that the arguments name."""
    plan_file, encoder, *names = arguments
    plan = BenchmarkPlan.read(plan_file)
    sources = Sources(plan, encoder, disable_tqdm=True)
    if not names:
        sources.clean  # noqa: B018 - trains it, if it is not there
        return
    attack, seed, *method = names
    cell = Cell(encoder, attack, int(seed), method[0] if method else "none")
    try:
        case = Case(sources, cell)
        # Drawn by the job that implants, before cells of one case run at a time
        case.reports(plan.most_reports())
        if method:
            write_json(cell.path(plan.output_dir), measured_cell(case, cell))
    except ImplantError as error:
        if method:
            write_json(cell.path(plan.output_dir), {**_identity(plan, cell), "refused": str(error)})


def measured_cell(case: Case, cell: Cell) -> dict[str, Any]:
    """Run a cell and return its json: the shape of `report.json`, with the names of the cell."""
    plan, settings = case.plan, case.plan.method_settings(cell.method)
    # What does not belong to the method is done before it, so that its cost is its own
    case.before, case.clean, case.kept, case.targets  # noqa: B018
    base = plan.base_method(cell.method) if cell.method in plan.methods else "mudjacking"
    repaired = repair(case, base, settings)
    after = case.features(repaired.encoder)
    content = {
        **_identity(plan, cell),
        "implant": {
            "CA": case.implant.clean_accuracy,
            "BA": case.implant.backdoored_accuracy,
            "ASR": case.implant.attack_success_rate,
        },
        **case_rates(case, after),
        "triggers": repaired.triggers,
        "cost": {
            "inversion_forwards": repaired.inversion_forwards,
            "forward_equivalents": repaired.forward_equivalents,
            "steps": repaired.steps,
            "inversion_seconds": round(repaired.inversion_seconds, 2),
            "seconds": round(repaired.seconds, 2),
            "peak_memory_mb": peak_memory_mb(repaired.encoder.device),
            "threads": torch.get_num_threads(),
        },
        "versions": library_versions(),
    }
    if plan.altered:
        classifier = case.kept[0][plan.classifiers[0]]
        content["altered"] = altered_rates(case, repaired.encoder, classifier)
    if repaired.curve:
        content["curve"] = repaired.curve
    if repaired.inversion is not None:
        picture = cell.path(plan.output_dir).with_suffix(".png")
        picture.parent.mkdir(parents=True, exist_ok=True)
        shown = case.implant.trigger if case.implant.trigger.kind != "input-aware" else None
        plot_repair(picture, case.reports()[0], repaired.inversion, shown)
    return content


def _identity(plan: BenchmarkPlan, cell: Cell) -> dict[str, Any]:
    names = {"encoder": cell.encoder, "attack": cell.attack, "seed": cell.seed, "method": cell.method}
    return {**names, "settings": plan.settings_of(cell)}


if __name__ == "__main__":
    main(sys.argv[1:])
