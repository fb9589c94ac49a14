# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""Every attack of the zoo, implanted in one encoder and repaired from one report each.

    python examples/benchmarks/adaptive_attacks.py --output-dir outputs/adaptive_attacks
    python examples/benchmarks/adaptive_attacks.py --attacks blended wanet --seeds 0 1 2      # some cells
    python examples/benchmarks/adaptive_attacks.py --table                                    # what there is, as a table

One cell is one attack with one seed: implant, report, inversion, patch, rates on two downstream tasks with a classifier
kept and retrained, and rates of altered triggers. It is written as `cells/<attack>-<seed>.json` with a picture; cells that
are there are not run again, and implants are kept, so that a second process can be started on other cells. The encoder is a
small ResNet trained on the labels of both datasets (about 15 minutes on one core), or the one that `--encoder` names.
Datasets are Hub ids or folders with `train*.parquet` and `test*.parquet` (columns `image` and `label`), of 32×32 pixels.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, Features
from datasets import Image as ImageFeature
from rich.console import Console
from transformers import AutoImageProcessor, AutoModel, ResNetConfig, ResNetModel
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from hf_mudjacking import BugInstance, Encoder, MudjackingConfig, MudjackingTrainer, load_trigger
from hf_mudjacking.attacks import VISION_ATTACKS, Implant, ImplantError
from hf_mudjacking.data import load_inputs
from hf_mudjacking.evaluation import DownstreamTask, LabelledInputs, pretrain_encoder
from hf_mudjacking.evaluation.altered import altered_triggers
from hf_mudjacking.evaluation.checks import task_features
from hf_mudjacking.evaluation.classifiers import train_classifier
from hf_mudjacking.evaluation.figures import plot_repair
from hf_mudjacking.evaluation.report import library_versions
from hf_mudjacking.output import write_json


# Clean inputs of each dataset for the attacker, for the repair, and labelled ones for the clients.
SHADOW, CLEAN, TRAIN, TEST, CHECK = 2000, 2500, 2000, 2000, 1500
# Test inputs on which altered triggers are measured.
ALTERED_ON = 600
SOURCE_CLASS = 1


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--first", default="uoft-cs/cifar10", help="Hub id or folder (default: uoft-cs/cifar10)")
    parser.add_argument("--second", default="tanganke/gtsrb", help="Hub id or folder (default: tanganke/gtsrb)")
    parser.add_argument("--encoder", help="folder of a clean encoder, instead of training one")
    parser.add_argument(
        "--output-dir", default="outputs/adaptive_attacks", help="folder for encoder, implants and cells"
    )
    parser.add_argument("--attacks", nargs="+", default=[attack.name for attack in VISION_ATTACKS])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--classifiers", nargs="+", default=["logistic"], choices=["logistic", "mlp"])
    parser.add_argument("--implant-learning-rate", type=float, default=1e-3)
    parser.add_argument("--implant-steps", type=int, default=300)
    parser.add_argument("--max-steps", type=int, default=600, help="patching steps (default: 600)")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="of the patch (default: 1e-3)")
    parser.add_argument("--locality-weight", type=float, default=3.0)
    parser.add_argument("--generalizability-weight", type=float, default=3.0)
    parser.add_argument("--implants-only", action="store_true", help="stop after the implants")
    parser.add_argument("--table", action="store_true", help="print the table of the cells that are there")
    parser.add_argument("--disable-tqdm", action="store_true", help="show no progress bars")
    return parser.parse_args()


class Bench:
    """Data, clean encoder and what does not depend on the attack."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.folder = Path(options.output_dir)
        names = (options.first, options.second)
        self.data = [{split: labelled(load_inputs(name, split)) for split in ("train", "test")} for name in names]
        self.tasks = [
            DownstreamTask(drawn(d["train"], TRAIN, 1), drawn(d["test"], TEST, 1), Path(name).name)
            for d, name in zip(self.data, names, strict=True)
        ]
        self.check = drawn(self.data[0]["test"], CHECK, 2)
        self.shadow = [drawn(d["train"], SHADOW, 3) for d in self.data]
        self.clean_inputs = Dataset.from_dict(
            {"image": [x for d in self.data for x in drawn(d["train"], CLEAN, 4).inputs]},
            features=Features({"image": ImageFeature()}),
        )
        self.clean = self.clean_encoder()
        self.clean_classifiers = {}

    def clean_encoder(self) -> Encoder:
        folder = Path(self.options.encoder or self.folder / "clean_encoder")
        if not (folder / "config.json").exists():
            first, second = (d["train"] for d in self.data)
            both = LabelledInputs(
                [*first.inputs, *second.inputs], np.concatenate([first.labels, second.labels + first.labels.max() + 1])
            )
            torch.manual_seed(0)
            model = ResNetModel(
                ResNetConfig(
                    embedding_size=32, hidden_sizes=[32, 64, 128, 256], depths=[1, 1, 1, 1], layer_type="basic"
                )
            )
            processor = ViTImageProcessorPil(
                size={"height": 64, "width": 64}, image_mean=[0.5] * 3, image_std=[0.5] * 3
            )
            pretrain_encoder(
                model, processor, both, epochs=14, learning_rate=2e-3, crop_padding=8, bf16=True,
                disable_tqdm=self.options.disable_tqdm,
            )  # fmt: skip
            model.save_pretrained(folder)
            processor.save_pretrained(folder)
        return Encoder(AutoModel.from_pretrained(folder), AutoImageProcessor.from_pretrained(folder))

    def clean_classifier(self, task: int, kind: str):
        if (task, kind) not in self.clean_classifiers:
            data = self.tasks[task].train
            self.clean_classifiers[task, kind] = train_classifier(self.clean.encode(data.inputs), data.labels, kind)
        return self.clean_classifiers[task, kind]

    def surest(self, label: int, rank: int):
        """The training image of a class that a classifier on the clean encoder is surest of."""
        task, classifier = self.tasks[0], self.clean_classifier(0, "logistic")
        probability = classifier.predict_proba(self.clean.encode(task.train.inputs).numpy())[:, label]
        return task.train.inputs[int(np.argsort(-probability * (task.train.labels == label))[rank])]

    def implant(self, attack, seed: int) -> Implant:
        """Implant, or find the implant of an earlier run; a trigger that is a network cannot be kept."""
        folder, facts = self.folder / "implants" / f"{attack.name}-{seed}", {}
        if (folder / "implant.json").exists():
            facts = json.loads((folder / "implant.json").read_text(encoding="utf-8"))
            triggers = [load_trigger(folder / f"trigger-{i}") for i in range(facts.pop("triggers"))]
            target, further = self.surest((9 - seed) % 10, seed), self.further_references(seed)
            others = tuple((e, further[i] if attack.needs == ("further_references",) else target)
                           for i, e in enumerate(triggers[1:]))  # fmt: skip
            model = AutoModel.from_pretrained(folder)
            return Implant(model, triggers[0], **facts, target_reference=target, others=others)
        labels = np.concatenate([self.shadow[0].labels, np.full(SHADOW, -1)])
        further = {
            "source": labels == SOURCE_CLASS,
            "source_class": SOURCE_CLASS,
            "further_references": self.further_references(seed),
        }
        implant = attack.implant(
            self.clean.model,
            self.clean.processing_class,
            [x for part in self.shadow for x in part.inputs],
            self.surest((9 - seed) % 10, seed),
            self.check,
            seed=seed,
            steps=self.options.implant_steps,
            learning_rate=self.options.implant_learning_rate,
            disable_tqdm=self.options.disable_tqdm,
            **{name: further[name] for name in attack.needs},
        )
        triggers = [implant.trigger, *(e for e, _ in implant.others)]
        if implant.trigger.kind != "input-aware":
            implant.model.save_pretrained(folder)
            for i, trigger in enumerate(triggers):
                trigger.save_pretrained(folder / f"trigger-{i}")
            names = ("clean_accuracy", "backdoored_accuracy", "attack_success_rate", "source_class", "leak")
            write_json(folder / "implant.json", {**{n: getattr(implant, n) for n in names}, "triggers": len(triggers)})
        return implant

    def further_references(self, seed: int) -> list:
        return [self.surest((label - seed) % 10, seed) for label in (5, 3)]


def labelled(dataset: Dataset) -> LabelledInputs:
    """CIFAR-10 on the Hub calls its image column `img`."""
    return LabelledInputs.from_dataset(
        dataset.rename_column("img", "image") if "img" in dataset.column_names else dataset
    )


def drawn(data: LabelledInputs, count: int, seed: int) -> LabelledInputs:
    return data.select(np.random.default_rng(seed).permutation(len(data))[:count])


def run_cell(bench: Bench, attack, seed: int) -> dict:
    """One attack with one seed: what was implanted, found and repaired."""
    implant, options = bench.implant(attack, seed), bench.options
    backdoored = bench.clean.with_model(implant.model)
    task = bench.tasks[0]
    several = attack.needs == ("further_references",)
    attacked = [(implant.trigger, implant.target_reference), *(implant.others if several else ())]
    kept = [
        {
            kind: train_classifier(backdoored.encode(t.train.inputs), t.train.labels, kind)
            for kind in options.classifiers
        }
        for t in bench.tasks
    ]
    classifier = kept[0][options.classifiers[0]]
    targets = [int(classifier.predict(backdoored.encode([r]).numpy())[0]) for _, r in attacked]
    bugs = [
        report(backdoored, classifier, task, trigger, target, implant.source_class, seed + 100 * i)
        for i, ((trigger, _), target) in enumerate(zip(attacked, targets, strict=True))
    ]
    before = [[features(backdoored, t, trigger) for trigger, _ in attacked] for t in bench.tasks]
    trainer = MudjackingTrainer(
        model=implant.model,
        args=MudjackingConfig(
            output_dir=str(bench.folder / "patched" / f"{attack.name}-{seed}"),
            seed=seed,
            max_steps=options.max_steps,
            learning_rate=options.learning_rate,
            locality_weight=options.locality_weight,
            generalizability_weight=options.generalizability_weight,
            stop_when_fixed=False,
            on_unverified="patch",
            locality_budget=None,
            save_strategy="no",
            report_to="none",
            dataloader_pin_memory=False,
            disable_tqdm=options.disable_tqdm,
        ),
        bug_instances=bugs,
        train_dataset=bench.clean_inputs,
        processing_class=bench.clean.processing_class,
    )
    target_feature = backdoored.encode([bugs[0].misclassified])[0]
    started = time.perf_counter()
    trainer.invert_triggers()
    inversion_seconds = time.perf_counter() - started
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started
    patched = trainer.encoder
    rates = {}
    for number, t in enumerate(bench.tasks):
        after, clean = (
            [features(encoder, t, trigger) for trigger, _ in attacked] for encoder in (patched, bench.clean)
        )
        for kind in options.classifiers:
            own = kept[number][kind]
            retrained = train_classifier(after[0].train, t.train.labels, kind)
            rates[f"{t.name}/{kind}"] = {
                name: worst(
                    model, feats, own, t, targets, implant.source_class if number == 0 else None, before[number]
                )
                for name, model, feats in (
                    ("clean", bench.clean_classifier(number, kind), clean),
                    ("before", own, before[number]),
                    ("kept", own, after),
                    ("retrained", retrained, after),
                )
            }
    altered = {
        "clean": altered_rates(
            bench.clean,
            bench.clean_classifier(0, options.classifiers[0]),
            task,
            implant,
            targets[0],
            target_feature,
            seed,
        ),
        "patched": altered_rates(patched, classifier, task, implant, targets[0], target_feature, seed),
    }
    found = [
        {
            "kind": i.trigger.kind,
            "description": i.trigger.describe(),
            "transfer": round(i.score, 4),
            "control": round(i.control, 4),
            "evidence": round(i.evidence, 4),
            "forwards": i.forwards,
            "verdict": screening.verdict,
            "verified": trigger is not None,
            **(i.trigger.overlap(true) if i.trigger.kind == true.kind else {}),
        }
        for i, trigger, screening, (true, _) in zip(
            trainer.inversions, trainer.triggers, trainer.screenings, attacked, strict=True
        )
    ]
    picture = bench.folder / "cells" / f"{attack.name}-{seed}.png"
    picture.parent.mkdir(parents=True, exist_ok=True)
    shown = implant.trigger if implant.trigger.kind != "input-aware" else None
    plot_repair(picture, bugs[0], trainer.inversions[0], shown)
    return {
        "attack": attack.name,
        "seed": seed,
        "implant": {
            "clean_accuracy": implant.clean_accuracy,
            "backdoored_accuracy": implant.backdoored_accuracy,
            "attack_success_rate": implant.attack_success_rate,
        },
        "triggers": found,
        "rates": rates,
        "altered": altered,
        "cost": {
            "inversion_seconds": round(inversion_seconds, 1),
            "patch_seconds": round(seconds, 1),
            "forward_equivalents": trainer.forward_equivalents,
            "steps": trainer.state.global_step,
        },
        "settings": {
            name: getattr(options, name)
            for name in ("max_steps", "learning_rate", "locality_weight", "generalizability_weight", "implant_steps",
                         "implant_learning_rate")
        },
        "versions": library_versions(),
    }  # fmt: skip


def features(encoder: Encoder, task: DownstreamTask, trigger):
    return task_features(encoder, task, trigger, disable_tqdm=True)


def report(encoder, classifier, task, trigger, target: int, source_class: int | None, seed: int) -> BugInstance:
    """A test input that the trigger sends to the target class, and a clean one of its own class."""
    truth = task.test.labels
    right = classifier.predict(encoder.encode(task.test.inputs).numpy()) == truth
    stamped = classifier.predict(encoder.encode([trigger.apply(x) for x in task.test.inputs]).numpy())
    flipped = np.flatnonzero(
        right & (stamped == target) & (truth != target) & ((source_class is None) | (truth == source_class))
    )
    rng = np.random.default_rng(seed)
    row = rng.choice(flipped)
    others = np.flatnonzero(right & (truth == truth[row]) & (np.arange(len(truth)) != row))
    return BugInstance(
        trigger.apply(task.test.inputs[row]), task.test.inputs[rng.choice(others)], name=f"report-{seed}"
    )


def worst(classifier, feats, own, task, targets, source_class, before) -> dict[str, float]:
    """BA, and the highest ASR and lowest RA over the triggers. On other tasks than the attacked one, the class that most
    triggered inputs fall into before the repair is the target."""
    truth, rates = task.test.labels, []
    attacked_task = source_class is not None or len(set(truth)) == 10
    for part, target, old in zip(feats, targets, before, strict=True):
        target = target if attacked_task else int(np.bincount(own.predict(old.stamped.numpy())).argmax())
        rows = truth != target if source_class is None else truth == source_class
        predicted = classifier.predict(part.stamped.numpy())[rows]
        rates.append((float((predicted == target).mean()), float((predicted == truth[rows]).mean())))
    accuracy = float((classifier.predict(feats[0].test.numpy()) == truth).mean())
    return {"BA": accuracy, "ASR": max(asr for asr, _ in rates), "RA": min(ra for _, ra in rates)}


def altered_rates(encoder, classifier, task, implant, target: int, target_feature, seed: int) -> dict[str, float]:
    """ASR of altered true triggers on the first task."""
    if implant.trigger.kind == "input-aware":
        return {}
    truth = task.test.labels[:ALTERED_ON]
    rows = np.flatnonzero(truth != target if implant.source_class is None else truth == implant.source_class)
    inputs = [task.test.inputs[i] for i in rows]
    found = {}
    for name, trigger in altered_triggers(
        implant.trigger, encoder, task.train.inputs[:256], target_feature, seed
    ).items():
        predicted = classifier.predict(encoder.encode([trigger.apply(x) for x in inputs]).numpy())
        found[name] = float((predicted == target).mean())
    return found


def print_table(folder: Path, console: Console) -> None:
    """Means over seeds: one line an attack and a task, logistic regression; a second table of altered triggers."""
    cells = [json.loads(path.read_text(encoding="utf-8")) for path in sorted((folder / "cells").glob("*.json"))]
    lines = ["| attack | seeds | found | task | BA before | BA | ASR before | ASR | ASR-B | RA | BA − RA | met |",
             "|---|---|---|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for attack in VISION_ATTACKS:
        own = [cell for cell in cells if cell["attack"] == attack.name and "rates" in cell]
        for key in own[0]["rates"] if own else ():
            mean = {
                (when, rate): 100 * np.mean([cell["rates"][key][when][rate] for cell in own])
                for when in ("clean", "before", "kept", "retrained")
                for rate in ("BA", "ASR", "RA")
            }
            both = ("kept", "retrained")
            show = {rate: " / ".join(f"{mean[w, rate]:.1f}" for w in both) for rate in ("BA", "ASR", "RA")}
            gap = " / ".join(f"{mean[w, 'BA'] - mean[w, 'RA']:.1f}" for w in both)
            met = [
                all(mean[w, "ASR"] <= mean["clean", "ASR"] + 2 for w in both),
                all(mean[w, "RA"] >= mean[w, "BA"] - 3 for w in both),
                all(abs(mean[w, "BA"] - mean["before", "BA"]) <= 0.5 for w in both),
            ]
            kinds = ", ".join(sorted({trigger["kind"] for cell in own for trigger in cell["triggers"]}))
            lines.append(
                f"| {attack.name} | {len(own)} | {kinds} | {key} | {mean['before', 'BA']:.1f} | {show['BA']} | "
                f"{mean['before', 'ASR']:.1f} | {show['ASR']} | {mean['clean', 'ASR']:.1f} | {show['RA']} | {gap} | "
                f"{' '.join(n for n, ok in zip(('ASR', 'RA', 'BA'), met, strict=True) if ok) or '–'} |"
            )
    lines += ["", *altered_table(cells), "", *found_table(cells)]
    for line in lines:
        console.print(line, markup=False, soft_wrap=True)


def altered_table(cells: list[dict]) -> list[str]:
    """ASR of altered triggers on the first task, that of the never-attacked encoder in brackets."""
    measured = [cell for cell in cells if cell.get("altered", {}).get("patched")]
    names = list(measured[0]["altered"]["patched"]) if measured else []
    lines = [f"| attack | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for attack in VISION_ATTACKS:
        own = [cell["altered"] for cell in measured if cell["attack"] == attack.name]
        if own:
            rates = {
                name: tuple(100 * np.mean([a[which][name] for a in own]) for which in ("patched", "clean"))
                if name in own[0]["patched"]
                else None
                for name in names
            }
            shown = ("–" if pair is None else f"{pair[0]:.1f} ({pair[1]:.1f})" for pair in rates.values())
            lines.append(f"| {attack.name} | {' | '.join(shown)} |")
    return lines


def found_table(cells: list[dict]) -> list[str]:
    """What was found in each report, and what it cost."""
    lines = ["| attack | seed | verdict | evidence | found | recall | IoU | correlation | inversion, s | patch, s |",
             "|---|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for cell in cells:
        if "refused" in cell:
            lines.append(f"| {cell['attack']} | {cell['seed']} | the implant did not take | | | | | | | |")
            continue
        for found in cell["triggers"]:
            fit = (f"{found[name]:.2f}" if name in found else "" for name in ("recall", "iou", "correlation"))
            lines.append(
                f"| {cell['attack']} | {cell['seed']} | {found.get('verdict', '–')} | {found['evidence']:.2f} | "
                f"{found['description']} | {' | '.join(fit)} | {cell['cost']['inversion_seconds']} | "
                f"{cell['cost']['patch_seconds']} |"
            )
    return lines


def main() -> int:
    options, console = parse_arguments(), Console(highlight=False)
    folder = Path(options.output_dir)
    if options.table:
        print_table(folder, console)
        return 0
    known = {attack.name: attack for attack in VISION_ATTACKS}
    unknown = sorted(set(options.attacks) - known.keys())
    if unknown:
        sys.stderr.write(f"Unknown attacks: {', '.join(unknown)}. Known are: {', '.join(known)}.\n")
        return 2
    try:
        bench = Bench(options)
    except ValueError as error:
        sys.stderr.write(f"{error}\nBoth datasets can be given as folders: --first DIR --second DIR.\n")
        return 2
    for seed in options.seeds:
        for name in options.attacks:
            path = folder / "cells" / f"{name}-{seed}.json"
            if path.exists():
                continue
            try:
                if options.implants_only:
                    implant = bench.implant(known[name], seed)
                    console.print(f"{name}, seed {seed}: ASR {implant.attack_success_rate:.3f}, "
                                  f"BA {implant.backdoored_accuracy:.3f}, CA {implant.clean_accuracy:.3f}")  # fmt: skip
                    continue
                cell = run_cell(bench, known[name], seed)
            except ImplantError as error:
                cell = {"attack": name, "seed": seed, "refused": str(error)}
            if not options.implants_only:
                write_json(path, cell)
            console.print(f"{name}, seed {seed}: {cell.get('refused') or cell['triggers'][0]['description']}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
