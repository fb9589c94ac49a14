# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""`report.json` and the table that people read."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any

from rich.markup import escape
from rich.table import Table

from ..screening import Screening
from ..triggers import TextTrigger


# Characters of a number, which is not to be cut however narrow the terminal is.
_NUMBER = 6
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
    table = Table(title=f"Downstream checks on {escape(task)} (percent)", title_justify="left")
    table.add_column("Classifier")
    table.add_column("Encoder")
    for name in ("BA", "ASR", "RA", "Bug fixed"):
        table.add_column(name, justify="right", min_width=_NUMBER)
    for kind, block in {classifier: rates, **rates.get("other_classifiers", {})}.items():
        label = escape(kind)
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
    resumed = f" (since it was resumed at step {cost['resumed_at_step']})" if "resumed_at_step" in cost else ""
    lines.append(
        f"Cost{resumed}: {cost['inversion_forwards']} forwards to invert, {cost['forward_equivalents']} forward-equivalents in all, "
        f"{cost['steps']} steps, {cost['seconds']:.1f} s, peak memory {cost['peak_memory_mb']} MB"
    )
    return lines


def comparison_tables(report: dict[str, Any]) -> list[Table]:
    """A table for each task of a report of [`~hf_mudjacking.evaluation.comparison.compare_encoders`]."""
    tasks = list(next(iter(report["compared"].values())))
    return [_comparison_table(task, report) for task in tasks]


def _comparison_table(task: str, report: dict[str, Any]) -> Table:
    blocks = {model: tasks[task] for model, tasks in report["compared"].items()}
    table = Table(title=f"Checks on {escape(task)} (percent; cosine)", title_justify="left")
    # By its name an encoder is told from another: rather two lines than a part
    table.add_column("Encoder", overflow="fold")
    table.add_column("Classifier")
    for name in ("Trigger", "BA", "ASR", "RA", "Agreement", "Cosine"):
        table.add_column(name, justify="right", min_width=_NUMBER)

    def add(model: str, classifier: str, block: dict[str, Any], rates: dict[str, float], *further: str) -> None:
        attack = _percent(rates["ASR"], rates["RA"]) if "ASR" in rates else ["", ""]
        table.add_row(
            escape(model), classifier, str(block.get("trigger", "")), *_percent(rates["BA"]), *attack, *further
        )

    for block in _per_trigger(next(iter(blocks.values()))):
        add(report["model"], "kept", block, block["before"]["kept"])
    for model, compared in blocks.items():
        table.add_section()
        clean = compared["clean_inputs"]
        for block in _per_trigger(compared):
            further = (*_percent(clean["agreement"]), f"{clean['mean_cosine']:.4f}")
            add(model, "kept", block, block["after"]["kept"], *further)
            add("", "retrained", block, block["after"]["retrained"])
    return table


def _per_trigger(block: dict[str, Any]) -> list[dict[str, Any]]:
    return [block, *block["other_triggers"]]


def _percent(*rates: float) -> list[str]:
    return [f"{100 * rate:.1f}" for rate in rates]


def screening_table(name: str, screening: Screening) -> Table:
    """The verdict on one report, its numbers and reasons."""
    table = Table(title=f"Report {escape(name)}", title_justify="left", show_header=False)
    table.add_row("verdict", f"[bold]{screening.verdict}[/bold]")
    table.add_row("believed", f"{screening.believed:.2f}")
    for key, value in screening.evidence.items():
        table.add_row(key.replace("_", " "), f"{value:.2f}")
    trigger = screening.found.trigger
    words = f": {' … '.join(trigger.spans)}" if isinstance(trigger, TextTrigger) else ""
    table.add_row("found", escape(f"{trigger.describe()}{words}"))
    for reason in screening.reasons:
        table.add_row("reason", escape(reason))
    return table
