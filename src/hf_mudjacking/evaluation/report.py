# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""`report.json` and the table that people read."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any

from rich.markup import escape
from rich.table import Table

from ..screening import Screening


_LIBRARIES = ("hf-mudjacking", "torch", "transformers", "accelerate", "peft", "datasets", "evaluate", "captum")


def library_versions() -> dict[str, str]:
    """Installed versions of the libraries that a result depends on; `"not installed"` for a missing one."""
    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def report_tables(report: dict[str, Any]) -> list[Table]:
    """The rates of a report, a table for each task, every classifier in it, in percent."""
    blocks = {report["settings"].get("task", "task"): report, **report.get("other_tasks", {})}
    return [_table(name, block, report["settings"]["classifier"]) for name, block in blocks.items()]


def _table(task: str, rates: dict[str, Any], classifier: str) -> Table:
    table = Table(title=f"Downstream checks on {task} (percent)", title_justify="left")
    table.add_column("Classifier")
    table.add_column("Encoder")
    for name in ("BA", "ASR", "RA", "Bug fixed"):
        table.add_column(name, justify="right")
    for kind, block in {classifier: rates, **rates.get("other_classifiers", {})}.items():
        label = kind
        if "clean" in block:
            clean = block["clean"]
            table.add_row(label, "never attacked", *_percent(clean["CA"], clean["ASR-B"], clean["RA"]), "")
            label = ""
        rows = {"before patching": block["before"]["kept"], "patched, classifier kept": block["after"]["kept"]}
        if "retrained" in block["after"]:
            rows["patched, classifier retrained"] = block["after"]["retrained"]
        for row, values in rows.items():
            # The report is of one task; the others have no x_b to fix.
            fixed = {True: "yes", False: "no", None: ""}[values.get("bug_fixed")]
            table.add_row(label, row, *_percent(values["BA"], values["ASR"], values["RA"]), fixed)
            label = ""
        table.add_section()
    return table


def report_lines(report: dict[str, Any]) -> list[str]:
    """Triggers and cost of a report, a line each."""
    lines = []
    for trigger in report["triggers"]:
        known = f", IoU with the true trigger {trigger['iou']:.2f}" if "iou" in trigger else ""
        given = f", transfer {trigger['transfer']:.2f}" if "transfer" in trigger else ", given by the user"
        lines.append(f"Trigger: {trigger['description']}{given}{known}")
    cost = report["cost"]
    lines.append(
        f"Cost: {cost['inversion_forwards']} forwards to invert, {cost['forward_equivalents']} forward-equivalents in all, "
        f"{cost['steps']} steps, {cost['seconds']:.1f} s, peak memory {cost['peak_memory_mb']} MB"
    )
    return lines


def _percent(*rates: float) -> list[str]:
    return [f"{100 * rate:.1f}" for rate in rates]


def screening_table(name: str, screening: Screening) -> Table:
    """The verdict on one report, its numbers and reasons."""
    table = Table(title=f"Report {escape(name)}", title_justify="left", show_header=False)
    table.add_row("verdict", f"[bold]{screening.verdict}[/bold]")
    table.add_row("believed", f"{screening.believed:.2f}")
    for key, value in screening.evidence.items():
        table.add_row(key.replace("_", " "), f"{value:.2f}")
    table.add_row("found", escape(screening.found.trigger.describe()))
    for reason in screening.reasons:
        table.add_row("reason", escape(reason))
    return table
