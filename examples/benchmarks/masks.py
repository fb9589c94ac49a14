# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""How well do inverted masks fit? 100 reports of local patches, on the implants that `mudjack benchmark` left.

    mudjack benchmark --config examples/benchmarks/attacks.yaml --implants-only
    python examples/benchmarks/masks.py --implants outputs/attacks/implants/resnet --encoder outputs/attacks/encoders/resnet

Reports are drawn in turn from the test pictures of both datasets and shared out evenly among the implants whose trigger is a
patch. Frames over most of the picture and patches of which any suffices (`large_patch`, `low_attribution`) are measured, but
no part of the 100.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm
from transformers import AutoImageProcessor, AutoModel

from hf_mudjacking import BugInstance, Encoder, PatchTrigger, invert_trigger, load_trigger
from hf_mudjacking.data import load_inputs
from hf_mudjacking.evaluation import LabelledInputs
from hf_mudjacking.evaluation.classifiers import train_classifier
from hf_mudjacking.evaluation.metrics import most_frequent
from hf_mudjacking.evaluation.report import library_versions
from hf_mudjacking.output import write_json


TRAIN, TEST, VALIDATION, OTHERS = 2000, 600, 32, 256
# What counts as found.
MIN_RECALL, MIN_IOU = 0.9, 0.75
NOT_LOCAL = ("large_patch", "low_attribution")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--first", default="uoft-cs/cifar10", help="Hub id or folder (default: uoft-cs/cifar10)")
    parser.add_argument("--second", default="tanganke/gtsrb", help="Hub id or folder (default: tanganke/gtsrb)")
    parser.add_argument("--encoder", required=True, help="folder of the clean encoder, for its processor")
    parser.add_argument("--implants", required=True, help="folder of implants, one sub-folder each")
    parser.add_argument("--output", default="outputs/masks.json")
    parser.add_argument("--attacks", nargs="+", help="sub-folders (default: all)")
    parser.add_argument("--reports", type=int, default=100, help="reports of local patches (default: 100)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--disable-tqdm", action="store_true", help="show no progress bar")
    return parser.parse_args()


def labelled(dataset: Dataset) -> LabelledInputs:
    """CIFAR-10 on the Hub calls its image column `img`."""
    return LabelledInputs.from_dataset(
        dataset.rename_column("img", "image") if "img" in dataset.column_names else dataset
    )


def drawn(data: LabelledInputs, count: int, seed: int) -> LabelledInputs:
    return data.select(np.random.default_rng(seed).permutation(len(data))[:count])


class Reports:
    """Reports on one implant, in turn from each of the tasks that its trigger works on; no two from one picture."""

    def __init__(
        self, encoder: Encoder, trigger: PatchTrigger, tasks: list[tuple[LabelledInputs, ...]], source: int | None
    ) -> None:
        self.trigger = trigger
        self.tasks = []
        for number, (train, test) in enumerate(tasks):
            # A class of the first task: the trigger does nothing on the second
            if source is not None and number > 0:
                continue
            classifier = train_classifier(encoder.encode(train.inputs), train.labels)
            right = classifier.predict(encoder.encode(test.inputs).numpy()) == test.labels
            stamped = classifier.predict(encoder.encode([trigger.apply(x) for x in test.inputs]).numpy())
            attacked = test.labels == source if source is not None else np.ones_like(right)
            target = most_frequent(stamped[attacked])
            self.tasks.append((test, right, right & attacked & (stamped == target) & (test.labels != target)))

    def draw(self, count: int, seed: int) -> list[BugInstance]:
        rng = np.random.default_rng(seed)
        orders = [rng.permutation(np.flatnonzero(flipped)) for _, _, flipped in self.tasks]
        bugs = []
        for i in range(count):
            turn, number = divmod(i, len(self.tasks))
            (test, right, _), row = self.tasks[number], orders[number][turn]
            fits = right & (test.labels == test.labels[row])
            fits[row] = False
            reference = test.inputs[rng.choice(np.flatnonzero(fits))]
            bugs.append(BugInstance(self.trigger.apply(test.inputs[row]), reference, name=f"report-{i}"))
        return bugs


def summary(rows: list[dict]) -> dict[str, float]:
    """Means over reports, and the share whose mask fits."""
    names = ("recall", "iou", "evidence", "forwards")
    fits = [row["recall"] >= MIN_RECALL and row["iou"] >= MIN_IOU for row in rows]
    means = {name: round(float(np.mean([row[name] for row in rows])), 4) for name in names}
    return {"reports": len(rows), **means, "fits": round(float(np.mean(fits)), 4)}


def main() -> None:
    options = parse_arguments()
    processor = AutoImageProcessor.from_pretrained(options.encoder)
    sets = [
        {split: labelled(load_inputs(name, split)) for split in ("train", "test")}
        for name in (options.first, options.second)
    ]
    tasks = [(drawn(part["train"], TRAIN, 1), drawn(part["test"], TEST, 1)) for part in sets]
    pool = [x for part in sets for x in drawn(part["train"], (VALIDATION + OTHERS) // 2, 4).inputs]
    pool = [pool[i] for i in np.random.default_rng(0).permutation(len(pool))]
    implants = []
    for path in sorted(Path(options.implants).iterdir()):
        wanted = (path / "implant.json").exists() and (not options.attacks or path.name in options.attacks)
        if wanted and isinstance(trigger := load_trigger(path / "trigger-0"), PatchTrigger):
            implants.append((path, trigger))
    local = [path for path, _ in implants if not path.name.startswith(NOT_LOCAL)]
    if not local:
        raise SystemExit(
            f"`{options.implants}` holds no implants of local patches. Make some: `mudjack benchmark --implants-only`."
        )
    rows = []
    for path, trigger in implants:
        facts = json.loads((path / "implant.json").read_text(encoding="utf-8"))
        encoder = Encoder(AutoModel.from_pretrained(path), processor)
        reports = Reports(encoder, trigger, tasks, facts["source_class"])
        # The remainder goes to the first implants
        extra = path in local and local.index(path) < options.reports % len(local)
        count = options.reports // len(local) + extra
        for bug in tqdm(reports.draw(count, options.seed), desc=path.name, disable=options.disable_tqdm):
            found = invert_trigger(encoder, bug, pool[:VALIDATION], other_inputs=pool[VALIDATION:], seed=options.seed)
            patch = found.trigger.kind == "patch"
            rows.append(
                {
                    "implant": path.name,
                    "report": bug.name,
                    "kind": found.trigger.kind,
                    **(found.trigger.overlap(trigger) if patch else {"recall": 0.0, "iou": 0.0}),
                    "evidence": found.evidence,
                    "forwards": found.forwards,
                }
            )
    groups = {path.name: [row for row in rows if row["implant"] == path.name] for path, _ in implants}
    groups["local patches"] = [row for row in rows if not row["implant"].startswith(NOT_LOCAL)]
    result = {name: summary(members) for name, members in groups.items() if members}
    table = Table()
    for column in ("implant", "reports", "recall", "IoU", "evidence", "forwards", "recall ≥ 0.9, IoU ≥ 0.75"):
        table.add_column(column)
    for name, facts in result.items():
        table.add_row(
            name, f"{facts['reports']}", f"{facts['recall']:.2f}", f"{facts['iou']:.2f}", f"{facts['evidence']:.2f}",
            f"{facts['forwards']:.0f}", f"{facts['fits']:.0%}",
        )  # fmt: skip
    Console(highlight=False).print(table)
    settings = {name: getattr(options, name) for name in ("first", "second", "reports", "seed")}
    write_json(
        Path(options.output),
        {"summary": result, "reports": rows, "settings": settings, "versions": library_versions()},
    )


if __name__ == "__main__":
    main()
