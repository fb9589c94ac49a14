# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""Are true reports believed and false ones not, and do masks fit? On the implants that `mudjack benchmark` left.

    mudjack benchmark --config examples/benchmarks/attacks.yaml --implants-only
    python examples/benchmarks/screening.py --benchmark outputs/attacks
    python examples/benchmarks/screening.py ... --attacks blended wanet        # some, in a second process
    python examples/benchmarks/screening.py ... --table                        # what there is

For each implant, true reports, those of the benchmark and more, and false ones of five kinds: natural misclassifications by the
clean encoder, triggered inputs with a reference of another class, adversarial examples (PGD on the encoder, 8/255, towards the
feature of another image), inputs with a piece of another clean image pasted in, and inputs with the trigger of another implant
that does not fire in this one. Where a true report's trigger is a patch, its mask is compared with the true one. The result is
written as `<attack>-<seed>.json`; those that are there are not measured again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from sklearn.metrics import roc_auc_score
from tqdm.auto import tqdm

from hf_mudjacking import BugInstance, Encoder, screen_report
from hf_mudjacking.benchmark import Case, kept_cases
from hf_mudjacking.evaluation.report import library_versions
from hf_mudjacking.inversion.pixels import PixelPath, to_array, to_tensor
from hf_mudjacking.output import write_json
from hf_mudjacking.reports import OTHER_INPUTS
from hf_mudjacking.triggers import ImageTrigger, PatchTrigger


VALIDATION = 32
PGD_RADIUS, PGD_STEPS = 8, 20
# Inputs that another implant's trigger is tried on, and the share of them that it may send to this one's targets.
FIRES_ON, FIRES = 64, 0.3
KINDS = ("natural", "mislabelled", "adversarial", "pasted", "other trigger")
# A mask fits with so much recall and IoU. Frames over most of the picture, and patches of which any suffices, do not count.
MIN_RECALL, MIN_IOU, NOT_LOCAL = 0.9, 0.75, ("large_patch", "low_attribution")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--benchmark", required=True, help="folder of a benchmark with implants")
    parser.add_argument("--encoder", help="name of an encoder in its plan (default: the first)")
    parser.add_argument("--output-dir", default="outputs/screening")
    parser.add_argument("--attacks", nargs="+", help="names of attacks (default: all)")
    parser.add_argument("--true", type=int, default=10, help="true reports on each implant (default: 10)")
    parser.add_argument("--false", type=int, default=2, help="false reports of each kind on each (default: 2)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--table", action="store_true", help="print the table of what is there")
    parser.add_argument("--disable-tqdm", action="store_true", help="show no progress bar")
    return parser.parse_args()


class Reports:
    """True and false reports on one implant."""

    def __init__(self, case: Case, other_triggers: list[ImageTrigger]) -> None:
        self.case = case
        task, kind = case.tasks[0], case.plan.classifiers[0]
        self.inputs, self.truth = task.test.inputs, task.test.labels
        clean = case.classifier(0, case.clean[0], kind).predict(case.clean[0].test.numpy())
        self.flipped = [case.flipped(number) for number in range(len(case.triggers))]
        self.right = self.flipped[0].right
        self.natural_errors = np.flatnonzero((clean != self.truth) & ~self.right)
        self.other_triggers = [trigger for trigger in other_triggers if not self._fires(trigger)]

    def _fires(self, trigger: ImageTrigger) -> bool:
        """Whether another implant's trigger works here too, as white squares of two attacks may: a report of it is true."""
        victims = np.flatnonzero(self.right & (self.truth != self.flipped[0].target))[:FIRES_ON]
        features = self.case.backdoored.encode([self.case.backdoored.stamp(trigger, self.inputs[i]) for i in victims])
        predicted = self.case.kept[0][self.case.plan.classifiers[0]].predict(features.numpy())
        return bool(np.isin(predicted, [each.target for each in self.flipped]).mean() > FIRES)

    def drawn(self, kind: str, count: int, seed: int) -> Iterator[tuple[BugInstance, ImageTrigger | None]]:
        """Reports of a kind, the true ones with the trigger that they are of."""
        if kind == "true":
            triggers = self.case.triggers
            each = -(-count // len(triggers))
            bugs = self.case.reports(each)
            # In turn from each trigger, until there are enough
            for i in range(count):
                turn, number = divmod(i, len(triggers))
                yield bugs[number * each + turn], triggers[number]
            return
        rng = np.random.default_rng(seed)
        for _ in range(count):
            yield getattr(self, kind.replace(" ", "_"))(rng), None

    def _reference(self, row: int, rng: np.random.Generator, same: bool = True) -> Image.Image:
        """A right input of the class of another, or of a class that is neither that nor the target's."""
        own = self.truth == self.truth[row]
        fits = self.right & (own if same else ~own & (self.truth != self.flipped[0].target))
        fits[row] = False
        return self.inputs[rng.choice(np.flatnonzero(fits))]

    def natural(self, rng: np.random.Generator) -> BugInstance:
        row = rng.choice(self.natural_errors)
        return BugInstance(self.inputs[row], self._reference(row, rng))

    def mislabelled(self, rng: np.random.Generator) -> BugInstance:
        row = rng.choice(np.flatnonzero(self.flipped[0].flipped))
        stamped = self.case.backdoored.stamp(self.case.triggers[0], self.inputs[row])
        return BugInstance(stamped, self._reference(row, rng, same=False))

    def adversarial(self, rng: np.random.Generator) -> BugInstance:
        row, other = rng.choice(np.flatnonzero(self.right), 2, replace=False)
        x = adversarial_example(self.case.backdoored, self.inputs[row], self.inputs[other])
        return BugInstance(x, self._reference(row, rng))

    def pasted(self, rng: np.random.Generator) -> BugInstance:
        row, other = rng.choice(np.flatnonzero(self.right), 2, replace=False)
        height, width = np.asarray(self.inputs[row]).shape[:2]
        side = rng.integers(10, 15)
        y, x = rng.integers(0, height - side), rng.integers(0, width - side)
        mask = np.zeros((height, width), dtype=bool)
        mask[y : y + side, x : x + side] = True
        crop = np.roll(np.asarray(self.inputs[other].convert("RGB")), rng.integers(-8, 9, 2), axis=(0, 1))
        return BugInstance(PatchTrigger(mask, crop).apply(self.inputs[row]), self._reference(row, rng))

    def other_trigger(self, rng: np.random.Generator) -> BugInstance:
        row = rng.choice(np.flatnonzero(self.right))
        trigger = self.other_triggers[rng.integers(len(self.other_triggers))]
        return BugInstance(trigger.apply(self.inputs[row]), self._reference(row, rng))


def measure(case: Case, reports: Reports, options: argparse.Namespace) -> dict:
    """Verdict and numbers of each report on one implant."""
    pool = list(case.sources.clean_inputs(VALIDATION + OTHER_INPUTS, options.seed))
    rows = []
    counts = {"true": options.true, **dict.fromkeys(KINDS, options.false)}
    bar = tqdm(total=sum(counts.values()), desc=case.attack.name, unit="report", disable=options.disable_tqdm)
    for kind, count in counts.items():
        for bug, true in reports.drawn(kind, count, options.seed):
            bar.update()
            try:
                screening = screen_report(
                    case.backdoored, bug, pool[:VALIDATION], pool[VALIDATION:], seed=options.seed
                )
            except ValueError:
                # "Nothing to patch": its inputs have nearly the same feature
                rows.append({"kind": kind, "verdict": "refused", "believed": 0.0})
                continue
            found = screening.found.trigger
            row = {"kind": kind, "family": found.kind, **screening.record(), "forwards": screening.found.forwards}
            if isinstance(true, PatchTrigger):
                row |= found.overlap(true) if isinstance(found, PatchTrigger) else {"recall": 0.0, "iou": 0.0}
            rows.append(row)
    bar.close()
    settings = {"true": options.true, "false": options.false, "seed": options.seed}
    name = f"{case.attack.name}-{case.seed}"
    return {"attack": name, "reports": rows, "settings": settings, "versions": library_versions()}


def adversarial_example(encoder: Encoder, x: Image.Image, other: Image.Image) -> Image.Image:
    """PGD towards the feature of another image, within 8 levels of each pixel."""
    path, clean = PixelPath(encoder.preprocessor, [x]), to_tensor([x])
    target = encoder.encode([other])[0]
    shift = torch.zeros_like(clean, requires_grad=True)
    for _ in range(PGD_STEPS):
        loss = (encoder.features({"pixel_values": path((clean + shift).clamp(0, 255))}) @ target).sum()
        (gradient,) = torch.autograd.grad(loss, shift)
        with torch.no_grad():
            shift.add_(2.5 * PGD_RADIUS / PGD_STEPS * gradient.sign()).clamp_(-PGD_RADIUS, PGD_RADIUS)
    pixels = to_array((clean + shift).clamp(0, 255)[0])
    return Image.fromarray(pixels.round().astype(np.uint8))


def summary(rows: list[dict]) -> dict:
    """AUROC of true against false reports and per kind, the share of each kind that is believed, and how masks fit."""
    true = [row for row in rows if row["kind"] == "true"]
    result = {"reports": len(rows), "true refused": float(np.mean([row["verdict"] != "trigger" for row in true]))}
    masks = [row for row in true if "iou" in row]
    if masks:
        fits = [row["recall"] >= MIN_RECALL and row["iou"] >= MIN_IOU for row in masks]
        means = {name: float(np.mean([row[name] for row in masks])) for name in ("recall", "iou")}
        result["masks"] = {"reports": len(masks), **means, "fits": float(np.mean(fits))}
    for kind in ("all", *KINDS):
        false = [row for row in rows if row["kind"] == kind or (kind == "all" and row["kind"] != "true")]
        if false:
            scores = [row["believed"] for row in [*true, *false]]
            result[kind] = {
                "AUROC": float(roc_auc_score([1] * len(true) + [0] * len(false), scores)),
                "believed": float(np.mean([row["verdict"] == "trigger" for row in false])),
                "verdicts": {
                    v: sum(row["verdict"] == v for row in false) for v in sorted({r["verdict"] for r in false})
                },
            }
    return result


def show(results: list[dict]) -> dict:
    """Print one line for each implant and one for all; give the summary of all."""
    rows = [row for result in results for row in result["reports"]]
    everything = summary(rows)
    local = [row for r in results if not r["attack"].startswith(NOT_LOCAL) for row in r["reports"] if "iou" in row]
    everything["masks"] = summary(local)["masks"] if local else None
    table = Table(title="AUROC (share believed)")
    for column in ("implant", "reports", "true refused", "recall", "IoU", "masks that fit", "all", *KINDS):
        table.add_column(column)
    for name, facts in [*((r["attack"], summary(r["reports"])) for r in results), ("all", everything)]:
        masks = facts.get("masks")
        shown = (
            ["", "", ""]
            if masks is None
            else [f"{masks['recall']:.2f}", f"{masks['iou']:.2f}", f"{masks['fits']:.0%}"]
        )
        cells = [facts.get(kind) for kind in ("all", *KINDS)]
        table.add_row(
            name,
            str(facts["reports"]),
            f"{facts['true refused']:.0%}",
            *shown,
            *("" if cell is None else f"{cell['AUROC']:.2f} ({cell['believed']:.2f})" for cell in cells),
        )
    Console(highlight=False).print(table)
    return everything


def main() -> None:
    options = parse_arguments()
    folder = Path(options.output_dir)
    if not options.table:
        triggers = {case.folder: case.triggers[0] for case in kept_cases(options.benchmark, options.encoder)}
        for case in kept_cases(options.benchmark, options.encoder, options.attacks):
            path = folder / f"{case.attack.name}-{case.seed}.json"
            if not path.exists():
                others = [trigger for other, trigger in triggers.items() if other != case.folder]
                if not others:
                    raise SystemExit(
                        f"`{options.benchmark}` holds one implant alone; another one's trigger is needed."
                    )
                write_json(path, measure(case, Reports(case, others), options))
    results = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*-*.json"))]
    if not results:
        raise SystemExit(f"`{folder}` holds no results.")
    write_json(folder / "summary.json", show(results))


if __name__ == "__main__":
    main()
