# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""Tables of a benchmark in Markdown, made of the json of its cells alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from .rates import goals


Cells = Sequence[dict[str, Any]]
_BOTH = ("kept", "retrained")


def benchmark_tables(cells: Cells) -> list[str]:
    """All tables, as lines; those that the cells have nothing for are left out."""
    done = [cell for cell in cells if "refused" not in cell]
    blocks = [
        table(done)
        for table in (worst_table, method_table, ours_against_peers, found_table, altered_table, curve_table)
    ]
    blocks.append(sorted({f"{_case(cell)}: {cell['refused']}" for cell in cells if "refused" in cell}))
    return [line for block in blocks if block for line in ("", *block)][1:]


def worst_table(cells: Cells) -> list[str]:
    """One line for each encoder, attack and method: the worst of all seeds, tasks and classifiers, and how many meet the goals.

    In points. What RA lies under BA by is set beside the same of the encoder that was never attacked: a trigger hides a part of the
    picture from it too.
    """
    rows = []
    for (encoder, attack, method), own in grouped(cells, "encoder", "attack", "method"):
        blocks = [block for cell in own for block in rate_blocks(cell)]
        met = [goals(block) for block in blocks]
        rows.append(
            (
                encoder, attack, method, str(len(own)),
                _worst(blocks, lambda block, after: after["ASR"] - block["clean"]["ASR-B"]),
                _worst(blocks, lambda _, after: after["BA"] - after["RA"]),
                f"{max(100 * (block['clean']['CA'] - block['clean']['RA']) for block in blocks):.1f}",
                _worst(blocks, lambda block, after: block["before"]["kept"]["BA"] - after["BA"]),
                *(f"{sum(each[name] for each in met)} of {len(met)}" for name in ("ASR", "RA", "BA")),
            )
        )  # fmt: skip
    head = ("encoder", "attack", "method", "seeds", "ASR above ASR-B", "RA under BA", "never attacked", "BA lost", "ASR met",
            "RA met", "BA met")  # fmt: skip
    return _table(head, rows)


def _worst(blocks: Sequence[dict[str, Any]], lost: Callable[[dict[str, Any], dict[str, float]], float]) -> str:
    """What is lost at most, in points, with classifiers kept and with new ones."""
    return " / ".join(f"{max(100 * lost(block, block['after'][way]) for block in blocks):.1f}" for way in _BOTH)


def method_table(cells: Cells) -> list[str]:
    """One line for each encoder, attack, task, classifier and method: means over seeds and their spread, in percent."""
    rows = []
    for (encoder, attack), own in grouped(cells, "encoder", "attack"):
        for task, kind in _rate_names(own[0]):
            for (method,), repaired in grouped(own, "method"):
                blocks = [_block(cell, task, kind) for cell in repaired]
                cost = [cell["cost"] for cell in repaired]
                met = [goals(block) for block in blocks]
                rows.append(
                    (
                        encoder, attack, f"{task}/{kind}", method, str(len(repaired)),
                        *(" / ".join(_spread(b["after"][w][rate] for b in blocks) for w in _BOTH) for rate in ("BA", "ASR", "RA")),
                        _spread(b["before"]["kept"]["BA"] for b in blocks), _spread(b["clean"]["ASR-B"] for b in blocks),
                        " ".join(name for name in ("ASR", "RA", "BA") if all(m[name] for m in met)) or "–",
                        f"{np.mean([c['forward_equivalents'] for c in cost]):,.0f}", f"{np.mean([c['seconds'] for c in cost]):.0f}",
                        f"{np.mean([c['peak_memory_mb'] for c in cost]):.0f}",
                    )
                )  # fmt: skip
    head = ("encoder", "attack", "task", "method", "seeds", "BA", "ASR", "RA", "BA before", "ASR-B", "met",
            "forward-equivalents", "seconds", "memory, MB")  # fmt: skip
    return _table(head, rows)


def ours_against_peers(cells: Cells, ours: str = "mudjacking") -> list[str]:
    """In each cell (classifier kept): the best RA among methods whose BA is within half a point of ours, or better.

    Ours is *best* if it is not below it, *tied* if it lies within the spread over seeds (the larger of both standard deviations,
    at least half a point), else *behind*.
    """
    rows = []
    for (encoder, attack), own in grouped(cells, "encoder", "attack"):
        methods = {method: repaired for (method,), repaired in grouped(own, "method")}
        if ours not in methods or len(methods) < 2:
            continue
        for task, kind in _rate_names(own[0]):
            rates = {
                method: {
                    rate: 100 * np.array([_block(cell, task, kind)["after"]["kept"][rate] for cell in repaired])
                    for rate in ("BA", "ASR", "RA")
                }
                for method, repaired in methods.items()
                if not method.startswith("oracle") and "=" not in method
            }
            mine = rates.pop(ours)
            equal = {m: r for m, r in rates.items() if r["BA"].mean() >= mine["BA"].mean() - 0.5}
            if not equal:
                rows.append((encoder, attack, f"{task}/{kind}", _mean(mine["RA"]), "none has such a BA", "", "best"))
                continue
            name = max(equal, key=lambda m: equal[m]["RA"].mean())
            best = equal[name]["RA"]
            margin = max(mine["RA"].std(), best.std(), 0.5)
            verdict = "best" if mine["RA"].mean() >= best.mean() else "tied"
            verdict = "behind" if mine["RA"].mean() < best.mean() - margin else verdict
            rows.append((encoder, attack, f"{task}/{kind}", _mean(mine["RA"]), name, _mean(best), verdict))
    return _table(("encoder", "attack", "task", f"RA of {ours}", "best peer at this BA", "its RA", ours), rows)


def found_table(cells: Cells) -> list[str]:
    """What was found in each report, and what it cost."""
    rows = []
    for cell in cells:
        for found in cell["triggers"]:
            fit = (f"{found[name]:.2f}" if name in found else "" for name in ("recall", "iou", "correlation"))
            evidence = f"{found['evidence']:.2f}" if "evidence" in found else ""
            names = (cell["encoder"], cell["attack"], cell["method"], str(cell["seed"]))
            cost = (str(found.get("forwards", "")), f"{cell['cost']['inversion_seconds']:.0f}")
            rows.append((*names, found.get("verdict", ""), evidence, found["description"], *fit, *cost))
    head = ("encoder", "attack", "method", "seed", "verdict", "evidence", "found", "recall", "IoU", "correlation",
            "forwards", "seconds")  # fmt: skip
    return _table(head, rows)


def altered_table(cells: Cells) -> list[str]:
    """ASR of altered triggers on the first task, in percent; `none` is the backdoored encoder."""
    measured = [cell for cell in cells if cell.get("altered")]
    groups = list(grouped(measured, "encoder", "attack", "method"))
    names = [
        name
        for name in dict.fromkeys(name for cell in measured for name in cell["altered"])
        if any(_has(own, name) for _, own in groups)
    ]
    rows = [
        (
            *key,
            str(len(own)),
            *(_spread(c["altered"][name] for c in own) if _has(own, name) else "–" for name in names),
        )
        for key, own in groups
    ]
    return _table(("encoder", "attack", "method", "seeds", *names), rows)


def _has(cells: Cells, name: str) -> bool:
    """Whether an altered trigger was measured in all cells."""
    return all(name in cell["altered"] for cell in cells)


def curve_table(cells: Cells) -> list[str]:
    """Rates on the way on the first task, classifier kept, in percent."""
    rows = []
    for (encoder, attack, method), own in grouped([c for c in cells if "curve" in c], "encoder", "attack", "method"):
        for points in zip(*(cell["curve"] for cell in own), strict=False):
            rows.append(
                (
                    encoder, attack, method, str(len(own)), str(points[0]["steps"]),
                    f"{np.mean([p['forward_equivalents'] for p in points]):,.0f}", f"{np.mean([p['seconds'] for p in points]):.0f}",
                    *(_spread(p[rate] for p in points) for rate in ("BA", "ASR", "RA")),
                )
            )  # fmt: skip
    return _table(
        ("encoder", "attack", "method", "seeds", "steps", "forward-equivalents", "seconds", "BA", "ASR", "RA"), rows
    )


def _case(cell: dict[str, Any]) -> str:
    return f"{cell['encoder']}/{cell['attack']}-{cell['seed']}"


def grouped(cells: Cells, *keys: str) -> Iterable[tuple[tuple[Any, ...], list[dict[str, Any]]]]:
    """Cells by the values of some keys, in the order they come in."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for cell in cells:
        groups.setdefault(tuple(cell[key] for key in keys), []).append(cell)
    return groups.items()


def _rate_names(cell: dict[str, Any]) -> list[tuple[str, str]]:
    """Names of task and classifier of all rates of a cell."""
    tasks, kinds = list(cell["settings"]["tasks"]), cell["settings"]["classifiers"]
    return [(task, kind) for task in tasks for kind in kinds]


def rate_blocks(cell: dict[str, Any]) -> list[dict[str, Any]]:
    """The rates of a cell on each task with each kind of classifier."""
    return [_block(cell, task, kind) for task, kind in _rate_names(cell)]


def _block(cell: dict[str, Any], task: str, kind: str) -> dict[str, Any]:
    """The rates of a cell on one task with one kind of classifier."""
    first, main = next(iter(cell["settings"]["tasks"])), cell["settings"]["classifiers"][0]
    block = cell if task == first else cell["other_tasks"][task]
    return block if kind == main else block["other_classifiers"][kind]


def _mean(percent: np.ndarray) -> str:
    return f"{percent.mean():.1f}" if len(percent) == 1 else f"{percent.mean():.1f} ± {percent.std():.1f}"


def _spread(rates: Iterable[float]) -> str:
    """Mean of rates in percent and, of several, their standard deviation."""
    return _mean(100 * np.array(list(rates)))


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table; nothing without rows."""
    line: Callable[[Sequence[str]], str] = lambda cells: f"| {' | '.join(cells)} |"  # noqa: E731
    return [line(head), "|---" * len(head) + "|", *map(line, rows)] if rows else []
