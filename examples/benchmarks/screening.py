# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""Are true reports believed and false ones not? On the implants that `mudjack benchmark` left.

    mudjack benchmark --config examples/benchmarks/attacks.yaml --implants-only
    python examples/benchmarks/screening.py --implants outputs/attacks/implants/resnet --encoder outputs/attacks/encoders/resnet
    python examples/benchmarks/screening.py ... --attacks blended wanet        # some, in a second process
    python examples/benchmarks/screening.py ... --table                        # what there is

For each implant, true reports, and false ones of five kinds: natural misclassifications by the clean encoder, triggered
inputs with a reference of another class, adversarial examples (PGD on the encoder, 8/255, towards the feature of another
image), inputs with a piece of another clean image pasted in, and inputs with the trigger of another implant. The result is
written as `<attack>.json`; those that are there are not measured again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from sklearn.metrics import roc_auc_score
from transformers import AutoImageProcessor, AutoModel

from hf_mudjacking import BugInstance, Encoder, load_trigger, screen_report
from hf_mudjacking.data import load_inputs
from hf_mudjacking.encoder import freeze_norm_statistics
from hf_mudjacking.evaluation import LabelledInputs
from hf_mudjacking.evaluation.classifiers import train_classifier
from hf_mudjacking.evaluation.metrics import most_frequent
from hf_mudjacking.evaluation.report import library_versions
from hf_mudjacking.inversion.pixels import PixelPath, to_array, to_tensor
from hf_mudjacking.output import write_json
from hf_mudjacking.triggers import PatchTrigger


TRAIN, TEST, VALIDATION, OTHERS = 2000, 1000, 32, 256
PGD_RADIUS, PGD_STEPS = 8, 20
KINDS = ("natural", "mislabelled", "adversarial", "pasted", "other trigger")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--first", default="uoft-cs/cifar10", help="Hub id or folder that reports are drawn from")
    parser.add_argument(
        "--second", default="tanganke/gtsrb", help="Hub id or folder; clean inputs are drawn from both"
    )
    parser.add_argument("--encoder", required=True, help="folder of the clean encoder")
    parser.add_argument("--implants", required=True, help="folder of implants, one sub-folder each")
    parser.add_argument("--output-dir", default="outputs/screening")
    parser.add_argument("--attacks", nargs="+", help="sub-folders (default: all)")
    parser.add_argument("--reports", type=int, default=10, help="reports of each kind (default: 10)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--table", action="store_true", help="print the table of what is there")
    return parser.parse_args()


class Reports:
    """Draws reports on one implant."""

    def __init__(self, bench: Bench, encoder: Encoder, folder: Path) -> None:
        self.bench, self.encoder = bench, encoder
        facts = json.loads((folder / "implant.json").read_text(encoding="utf-8"))
        self.trigger = load_trigger(folder / "trigger-0")
        self.inputs, self.truth = bench.test.inputs, bench.test.labels
        classifier = train_classifier(encoder.encode(bench.train.inputs), bench.train.labels)
        self.classes = classifier.predict(encoder.encode(self.inputs).numpy())
        stamped = classifier.predict(encoder.encode([self.trigger.apply(x) for x in self.inputs]).numpy())
        self.right = self.classes == self.truth
        source = facts.get("source_class")
        of_source = self.truth == source if source is not None else np.ones_like(self.right)
        self.target = most_frequent(stamped[of_source])
        self.flipped = np.flatnonzero(self.right & of_source & (stamped == self.target) & (self.truth != self.target))
        others = [path for path in sorted(folder.parent.iterdir()) if (path / "trigger-0").exists() and path != folder]
        self.other_triggers = [load_trigger(path / "trigger-0") for path in others]

    def reference(self, row: int, rng: np.random.Generator, same: bool = True) -> Image.Image:
        """A right input of the class of another, or of a class that is neither that nor the target's."""
        fits = self.truth == self.truth[row] if same else (self.truth != self.truth[row]) & (self.truth != self.target)
        fits = fits & self.right
        fits[row] = False
        return self.inputs[rng.choice(np.flatnonzero(fits))]

    def true(self, rng: np.random.Generator) -> BugInstance:
        row = rng.choice(self.flipped)
        return BugInstance(self.trigger.apply(self.inputs[row]), self.reference(row, rng))

    def natural(self, rng: np.random.Generator) -> BugInstance:
        wrong = np.flatnonzero((self.bench.clean_classes != self.truth) & ~self.right)
        row = rng.choice(wrong)
        return BugInstance(self.inputs[row], self.reference(row, rng))

    def mislabelled(self, rng: np.random.Generator) -> BugInstance:
        row = rng.choice(self.flipped)
        return BugInstance(self.trigger.apply(self.inputs[row]), self.reference(row, rng, same=False))

    def adversarial(self, rng: np.random.Generator) -> BugInstance:
        row, other = rng.choice(np.flatnonzero(self.right), 2, replace=False)
        x = adversarial_example(self.encoder, self.inputs[row], self.inputs[other])
        return BugInstance(x, self.reference(row, rng))

    def pasted(self, rng: np.random.Generator) -> BugInstance:
        row, other = rng.choice(np.flatnonzero(self.right), 2, replace=False)
        height, width = np.asarray(self.inputs[row]).shape[:2]
        side = rng.integers(10, 15)
        y, x = rng.integers(0, height - side), rng.integers(0, width - side)
        mask = np.zeros((height, width), dtype=bool)
        mask[y : y + side, x : x + side] = True
        crop = np.roll(np.asarray(self.inputs[other].convert("RGB")), rng.integers(-8, 9, 2), axis=(0, 1))
        return BugInstance(PatchTrigger(mask, crop).apply(self.inputs[row]), self.reference(row, rng))

    def other_trigger(self, rng: np.random.Generator) -> BugInstance:
        row = rng.choice(np.flatnonzero(self.right))
        trigger = self.other_triggers[rng.integers(len(self.other_triggers))]
        return BugInstance(trigger.apply(self.inputs[row]), self.reference(row, rng))


class Bench:
    """Data, and what the clean encoder makes of it."""

    def __init__(self, options: argparse.Namespace) -> None:
        sets = [
            {split: labelled(load_inputs(name, split)) for split in ("train", "test")}
            for name in (options.first, options.second)
        ]
        self.train, self.test = drawn(sets[0]["train"], TRAIN, 1), drawn(sets[0]["test"], TEST, 1)
        count = (VALIDATION + OTHERS) // 2
        pool = [x for part in sets for x in drawn(part["train"], count, 4).inputs]
        pool = [pool[i] for i in np.random.default_rng(0).permutation(len(pool))]
        self.validation, self.others = pool[:VALIDATION], pool[VALIDATION:]
        self.clean = Encoder(
            AutoModel.from_pretrained(options.encoder), AutoImageProcessor.from_pretrained(options.encoder)
        )
        classifier = train_classifier(self.clean.encode(self.train.inputs), self.train.labels)
        self.clean_classes = classifier.predict(self.clean.encode(self.test.inputs).numpy())

    def measure(self, folder: Path, count: int, seed: int) -> dict:
        """Verdict and numbers of each report on one implant."""
        model = AutoModel.from_pretrained(folder)
        # As the trainer has it
        freeze_norm_statistics(model)
        encoder = self.clean.with_model(model)
        reports = Reports(self, encoder, folder)
        rows = []
        for kind in ("true", *KINDS):
            if kind == "other trigger" and not reports.other_triggers:
                continue
            rng = np.random.default_rng(seed)
            for _ in range(count):
                bug = getattr(reports, kind.replace(" ", "_"))(rng)
                try:
                    screening = screen_report(encoder, bug, self.validation, self.others, seed=seed)
                except ValueError:
                    # "Nothing to patch": its inputs have nearly the same feature
                    rows.append({"kind": kind, "verdict": "refused", "believed": 0.0})
                    continue
                family = screening.found.trigger.kind
                rows.append({"kind": kind, "family": family, **screening.record()})
        return {"attack": folder.name, "reports": rows, "versions": library_versions()}


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


def labelled(dataset) -> LabelledInputs:
    """CIFAR-10 on the Hub calls its image column `img`."""
    return LabelledInputs.from_dataset(
        dataset.rename_column("img", "image") if "img" in dataset.column_names else dataset
    )


def drawn(data: LabelledInputs, count: int, seed: int) -> LabelledInputs:
    return data.select(np.random.default_rng(seed).permutation(len(data))[:count])


def summary(rows: list[dict]) -> dict:
    """AUROC of true against false reports and per kind, and the share of each kind that is believed."""
    true = [row for row in rows if row["kind"] == "true"]
    result = {"reports": len(rows), "true refused": float(np.mean([row["verdict"] != "trigger" for row in true]))}
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


def main() -> None:
    options = parse_arguments()
    folder, console = Path(options.output_dir), Console(highlight=False)
    implants = sorted(path for path in Path(options.implants).iterdir() if (path / "trigger-0").exists())
    if options.attacks:
        implants = [path for path in implants if path.name in options.attacks]
    if not options.table:
        bench = Bench(options)
        for path in implants:
            if not (folder / f"{path.name}.json").exists():
                result = bench.measure(path, options.reports, options.seed)
                write_json(folder / f"{path.name}.json", {**result, "summary": summary(result["reports"])})
    results = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*-*.json"))]
    results.append({"attack": "all", "summary": summary([row for r in results for row in r["reports"]])})
    table = Table(title="AUROC (share believed)")
    for column in ("implant", "true refused", "all", *KINDS):
        table.add_column(column)
    for result in results:
        facts = result["summary"]
        cells = [facts.get(kind) for kind in ("all", *KINDS)]
        table.add_row(
            result["attack"],
            f"{facts['true refused']:.2f}",
            *("" if cell is None else f"{cell['AUROC']:.2f} ({cell['believed']:.2f})" for cell in cells),
        )
    console.print(table)
    write_json(folder / "summary.json", results[-1]["summary"])


if __name__ == "__main__":
    main()
