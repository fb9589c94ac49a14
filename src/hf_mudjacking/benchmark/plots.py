# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""Pictures of a benchmark: methods side by side, attacks side by side, quality against compute, quality against a setting."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from .rates import ASR_GOAL, BA_GOAL, RA_GOAL
from .tables import Cells, grouped, rate_blocks


_RATES = ("BA", "ASR", "RA")
_WAYS = {"kept": "#2a6f97", "retrained": "#e09f3e"}
# Of differences to goals, in points: up to where the axis is linear, and what stands at it on either side
_LINEAR, _TICKS = 5, (0, 1, 3, 10, 40)


def plot_benchmark(folder: Path, cells: Cells) -> list[Path]:
    """Draw what the cells have something for.

    Args:
        folder (`Path`): Where the pictures go.
        cells (`Sequence[dict]`): Cells, as read from their json.

    Returns:
        `list[Path]`: The pictures.
    """
    done = [cell for cell in cells if "refused" not in cell]
    written = []
    for (encoder, attack), own in grouped(done, "encoder", "attack"):
        for name, draw in (("methods", _draw_methods), ("compute", _draw_compute)):
            figure = draw(own, f"{attack} on {encoder}")
            if figure is not None:
                written.append(folder / f"{name}-{encoder}-{attack}.png")
                figure.savefig(written[-1], dpi=120)
        swept = sorted({cell["method"].partition("=")[0] for cell in own if "=" in cell["method"]})
        for setting in swept:
            figure = _draw_sweep(own, setting, f"{attack} on {encoder}")
            written.append(folder / f"{setting}-{encoder}-{attack}.png")
            figure.savefig(written[-1], dpi=120)
    repaired = [cell for cell in done if cell["method"] != "none"]
    for (encoder,), of_one in grouped(repaired, "encoder"):
        methods = list(grouped(of_one, "method"))
        # Where these are what it is about
        if len({cell["attack"] for cell in of_one}) > len(methods):
            for (method,), own in methods:
                written.append(folder / f"attacks-{encoder}-{method}.png")
                attacks = {attack: seeds for (attack,), seeds in grouped(own, "attack")}
                _draw_attacks(attacks, f"{method} on {encoder}").savefig(written[-1], dpi=120)
    return written


def _draw_methods(cells: Cells, title: str) -> Any:
    """BA, ASR and RA of all methods, kept and retrained; marks are single seeds."""
    from matplotlib.figure import Figure

    methods = {method: own for (method,), own in grouped(cells, "method") if "=" not in method}
    if len(methods) < 2:
        return None
    figure = Figure(figsize=(11, 1.6 + 0.32 * len(methods)), layout="constrained")
    axes = figure.subplots(1, 3, sharey=True)
    rows = np.arange(len(methods))
    for axis, rate in zip(axes, _RATES, strict=True):
        for shift, (when, colour) in zip((-0.18, 0.18), _WAYS.items(), strict=True):
            values = [[100 * cell["after"][when][rate] for cell in own] for own in methods.values()]
            axis.barh(rows + shift, [np.mean(v) for v in values], 0.34, color=colour, label=f"classifier {when}")
            for row, points in zip(rows, values, strict=True):
                axis.plot(points, [row + shift] * len(points), ".", color="black", markersize=4)
        reference = {"BA": ("before", "kept", "BA"), "ASR": ("clean", "ASR-B"), "RA": ("clean", "RA")}[rate]
        axis.axvline(np.mean([100 * _at(cell, reference) for cell in cells]), color="grey", linestyle=":")
        axis.set_title({"BA": "BA (dotted: before)"}.get(rate, f"{rate} (dotted: never attacked)"))
        axis.set_xlim(0, 100)
        axis.set_xlabel("percent")
    axes[0].set_yticks(rows, list(methods))
    axes[0].invert_yaxis()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    figure.suptitle(title)
    return figure


def _draw_attacks(attacks: dict[str, Cells], title: str) -> Any:
    """How far one method leaves each attack from the goals; a mark for each rate of each seed, task and classifier."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator

    figure = Figure(figsize=(12, 1.6 + 0.34 * len(attacks)), layout="constrained")
    axes = figure.subplots(1, 3, sharey=True)
    panels = (
        ("ASR above ASR-B", (ASR_GOAL,), lambda block, after: after["ASR"] - block["clean"]["ASR-B"]),
        ("RA under BA", (RA_GOAL,), lambda _, after: after["BA"] - after["RA"]),
        ("BA against before", (-BA_GOAL, BA_GOAL), lambda block, after: after["BA"] - block["before"]["kept"]["BA"]),
    )  # fmt: skip
    for axis, (name, lines, of) in zip(axes, panels, strict=True):
        for row, own in enumerate(attacks.values()):
            blocks = [block for cell in own for block in rate_blocks(cell)]
            for shift, (way, colour) in zip((-0.17, 0.17), _WAYS.items(), strict=True):
                points = [100 * of(block, block["after"][way]) for block in blocks]
                label = f"classifier {way}" if row == 0 else None
                axis.plot(points, [row + shift] * len(points), "o", color=colour, alpha=0.6, markersize=4, label=label)
        for goal in lines:
            axis.axvline(100 * goal, color="black", linestyle=":", linewidth=1)
        # Far from a goal it does not matter how far
        axis.set_xscale("symlog", linthresh=_LINEAR)
        axis.xaxis.set_major_locator(FixedLocator([s * tick for tick in _TICKS for s in (-1, 1)]))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.grid(axis="x", alpha=0.3)
        axis.set_title(name)
        axis.set_xlabel("points (dotted: goal)")
    axes[0].set_yticks(range(len(attacks)), list(attacks))
    axes[0].invert_yaxis()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    figure.suptitle(title)
    return figure


def _draw_compute(cells: Cells, title: str) -> Any:
    """Rates on the way against forward-equivalents, mean over seeds; the end of each method is a larger mark."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    measured = {method: own for (method,), own in grouped([c for c in cells if "curve" in c], "method")}
    if not measured:
        return None
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    axes = figure.subplots(1, 3)
    for axis, rate in zip(axes, _RATES, strict=True):
        for method, own in measured.items():
            shared = min(len(cell["curve"]) for cell in own)
            points = [[cell["curve"][i] for cell in own] for i in range(shared)]
            x = [np.mean([p["forward_equivalents"] for p in row]) for row in points]
            y = [100 * np.mean([p[rate] for p in row]) for row in points]
            (line,) = axis.plot(x, y, ".-", label=method)
            end = np.mean([cell["cost"]["forward_equivalents"] for cell in own])
            axis.plot(
                end, 100 * np.mean([c["after"]["kept"][rate] for c in own]), "o", color=line.get_color(), markersize=8
            )
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.set_xlabel("forward-equivalents")
        axis.set_title(f"{rate}, percent")
    axes[0].legend(frameon=False)
    figure.suptitle(title)
    return figure


def _draw_sweep(cells: Cells, setting: str, title: str) -> Any:
    """BA, ASR and RA against the values of a setting; bars are the spread over seeds."""
    from matplotlib.figure import Figure

    own = {
        method.partition("=")[2]: found
        for (method,), found in grouped(cells, "method")
        if method.startswith(f"{setting}=")
    }
    figure = Figure(figsize=(5, 3.6), layout="constrained")
    axis = figure.subplots()
    positions = np.arange(len(own))
    for rate, colour in zip(_RATES, ("#2a6f97", "#ae2012", "#588157"), strict=True):
        values = [[100 * cell["after"]["kept"][rate] for cell in found] for found in own.values()]
        axis.errorbar(
            positions, [np.mean(v) for v in values], [np.std(v) for v in values], fmt="o-", color=colour, label=rate, capsize=3
        )  # fmt: skip
    axis.set_xticks(positions, list(own))
    axis.set_xlabel(setting.replace("_", " "))
    axis.set_ylabel("percent, classifier kept")
    axis.legend(frameon=False)
    axis.set_title(title)
    return figure


def _at(cell: dict[str, Any], path: tuple[str, ...]) -> float:
    for name in path:
        cell = cell[name]
    return float(cell)
