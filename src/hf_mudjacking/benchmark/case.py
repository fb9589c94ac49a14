# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""What all methods against one implant share: the backdoored encoder, its triggers, the reports, the clients' classifiers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from ..attacks import Implant, ImplantError
from ..attacks.implant import nameless_copy
from ..bug_instance import BugInstance
from ..encoder import Encoder
from ..evaluation.classifiers import Classifier, train_classifier
from ..evaluation.drawing import FlippedInputs, flipped_inputs
from ..evaluation.metrics import most_frequent
from ..evaluation.tasks import DownstreamTask
from ..loading import load_model
from ..output import staged, write_json
from ..preprocessing import RawInput
from ..triggers import Trigger, load_trigger
from .plan import ATTACKS, PLAN_FILE, BenchmarkPlan, Cell
from .sources import Sources


IMPLANTS_FOLDER = "implants"
_FACTS_FILE, _FEATURES_FILE = "implant.json", "features.safetensors"
_FACTS = ("clean_accuracy", "backdoored_accuracy", "attack_success_rate", "source_class", "leak")


@dataclass(frozen=True)
class StampedFeatures:
    """Features of a task's inputs in one encoder.

    Args:
        train (`FloatTensor` of shape `(N, D)`): Features of the classifier's training inputs.
        test (`FloatTensor` of shape `(M, D)`): Features of the clean test inputs.
        stamped (`list[FloatTensor]`): Features `(M, D)` of the test inputs with each trigger.
    """

    train: torch.Tensor
    test: torch.Tensor
    stamped: list[torch.Tensor]


class Case:
    """One implant with its reports.

    Args:
        sources (`Sources`): Data and clean encoder.
        cell (`Cell`): Any cell of the case.

    Raises:
        ImplantError: If the backdoor did not take.
    """

    def __init__(self, sources: Sources, cell: Cell) -> None:
        self.sources = sources
        self.plan: BenchmarkPlan = sources.plan
        self.attack = ATTACKS[cell.attack]
        self.seed = cell.seed
        self.folder = Path(self.plan.output_dir) / IMPLANTS_FOLDER / cell.case
        self.implant = self._loaded() or self._implanted()
        # Of one backdoor, each of several triggers may lead to a class of its own; one that any of them sets off has one
        several = "further_references" in self.attack.needs
        self.triggers: list[Trigger] = [self.implant.trigger, *(e for e, _ in self.implant.others if several)]
        self.backdoored = sources.clean.with_model(self.implant.model)

    @property
    def tasks(self) -> list[DownstreamTask]:
        """The clients' tasks."""
        return self.sources.tasks

    # ---- Implant ----

    @property
    def _made_with(self) -> dict[str, Any]:
        return self.plan.implant_depends_on(self.sources.encoder_name, self.attack.name)

    def _implanted(self) -> Implant:
        """Implant, and keep it: a trigger that is a network cannot be kept."""
        settings = {
            **self.plan.implant_settings(self.attack.name),
            "seed": self.seed,
            "disable_tqdm": self.sources.disable_tqdm,
        }
        inputs = [x for part in self.sources.shadow for x in part.inputs]
        clean = self.sources.clean
        arguments: list[Any] = [clean.model, clean.processing_class, inputs]
        if clean.modality == "image":
            arguments.append(self.sources.surest(self._target, self.seed))
        further = self._further() if self.attack.needs else {}
        settings |= {name: further[name] for name in self.attack.needs}
        try:
            implant = self.attack.implant(
                *arguments, self.sources.check, feature_source=clean.feature_source, **settings
            )
        except ImplantError as error:
            write_json(self.folder / _FACTS_FILE, {"refused": str(error), "settings": self._made_with})
            raise
        self._keep(implant)
        return implant

    def _further(self) -> dict[str, Any]:
        """What some attacks on images need besides."""
        first, *others = self.sources.shadow
        labels = np.concatenate([first.labels, *(np.full(len(part), -1) for part in others)])
        if "further_references" in self.attack.needs:
            return {"further_references": [self.sources.surest(c, self.seed) for c in self._other_classes(6, 4)]}
        (source,) = self._other_classes(2)
        return {"source": labels == source, "source_class": source}

    def _other_classes(self, *steps: int) -> list[int]:
        """Classes that are some steps from the target's, all different: where one is taken, the next that is free."""
        count, at = len(self._classes), self._classes.index(self._target)
        found = [self._target]
        for step in steps:
            free = (self._classes[(at + step + i) % count] for i in range(count))
            other = next((label for label in free if label not in found), None)
            if other is None:
                raise ImplantError(
                    f"{self.attack.name} needs {len(steps) + 1} classes or more; the first task has {count}."
                )
            found.append(other)
        return found[1:]

    @cached_property
    def _classes(self) -> list[int]:
        return np.unique(self.tasks[0].train.labels).tolist()

    @property
    def _target(self) -> int:
        """The attacker's class of the first task."""
        return self._classes[(-1 - self.seed) % len(self._classes)]

    def _keep(self, implant: Implant) -> None:
        pairs = [(implant.trigger, implant.target_reference), *implant.others]
        facts = {name: getattr(implant, name) for name in _FACTS} | {"settings": self._made_with}
        with staged(self.folder) as staging:
            if implant.trigger.kind != "input-aware":
                implant.model.save_pretrained(staging)
                for i, (trigger, reference) in enumerate(pairs):
                    trigger.save_pretrained(staging / f"trigger-{i}")
                    if isinstance(reference, Image.Image):
                        reference.save(staging / f"reference-{i}.png")
                facts["triggers"] = len(pairs)
            (staging / _FACTS_FILE).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")

    def _loaded(self) -> Implant | None:
        """The implant of an earlier process, if it was kept.

        Raises:
            ImplantError: If it did not take then.
            ValueError: If it was made with other settings than the plan's.
        """
        path = self.folder / _FACTS_FILE
        if not path.exists():
            return None
        facts = json.loads(path.read_text(encoding="utf-8"))
        there = facts.pop("settings", None)
        if there != (wanted := self._made_with):
            different = [name for name in {**(there or {}), **wanted} if (there or {}).get(name) != wanted.get(name)]
            was, says = ({name: part.get(name) for name in different} for part in (there or {}, wanted))
            raise ValueError(
                f"The implant in `{self.folder}` was made with {was}, the plan says {says}. Remove that folder and "
                "the cells of it, or choose another output folder."
            )
        if "refused" in facts:
            raise ImplantError(facts["refused"])
        if "triggers" not in facts:
            return None
        pairs = [
            (load_trigger(self.folder / f"trigger-{i}"), _opened(self.folder / f"reference-{i}.png"))
            for i in range(facts.pop("triggers"))
        ]
        (trigger, reference), *others = pairs
        model = load_model(self.folder).to(self.sources.device)
        return Implant(model, trigger, **facts, target_reference=reference, others=tuple(others))

    def fresh_model(self) -> nn.Module:
        """A copy of the backdoored model that may be changed."""
        return nameless_copy(self.implant.model)

    # ---- What clients see ----

    def features(self, encoder: Encoder) -> list[StampedFeatures]:
        """Features of all tasks in an encoder."""

        def encode(inputs: list[RawInput]) -> torch.Tensor:
            return encoder.encode(inputs, disable_tqdm=self.sources.disable_tqdm, desc="Features")

        return [
            StampedFeatures(
                encode(task.train.inputs),
                encode(task.test.inputs),
                [encode([encoder.stamp(e, x) for x in task.test.inputs]) for e in self.triggers],
            )
            for task in self.tasks
        ]

    @cached_property
    def before(self) -> list[StampedFeatures]:
        """Features of all tasks in the backdoored encoder."""
        return self._stored("before", self.backdoored)

    @cached_property
    def clean(self) -> list[StampedFeatures]:
        """Features of all tasks in the encoder that was never attacked."""
        return self._stored("clean", self.sources.clean)

    def _stored(self, name: str, encoder: Encoder) -> list[StampedFeatures]:
        """Features that are the same for all methods, encoded once."""
        path = self.folder / f"{name}_{_FEATURES_FILE}"
        if not path.exists():
            tensors = {}
            for i, task in enumerate(self.features(encoder)):
                tensors |= {f"{i}.train": task.train, f"{i}.test": task.test}
                tensors |= {f"{i}.stamped.{j}": stamped for j, stamped in enumerate(task.stamped)}
            with staged(self.folder) as staging:
                save_file({key: value.contiguous() for key, value in tensors.items()}, staging / path.name)
        stored = load_file(path)
        return [
            StampedFeatures(
                stored[f"{i}.train"],
                stored[f"{i}.test"],
                [stored[f"{i}.stamped.{j}"] for j in range(len(self.triggers))],
            )
            for i in range(len(self.tasks))
        ]

    def classifier(self, task: int, features: StampedFeatures, kind: str) -> Classifier:
        """A client's classifier on an encoder's features."""
        return train_classifier(features.train, self.tasks[task].train.labels, kind, self.seed)

    @cached_property
    def kept(self) -> list[dict[str, Classifier]]:
        """The classifiers that clients trained before the repair, of each kind, for each task."""
        return [
            {kind: self.classifier(i, features, kind) for kind in self.plan.classifiers}
            for i, features in enumerate(self.before)
        ]

    @cached_property
    def targets(self) -> list[list[int]]:
        """For each task, the class that each trigger leads to.

        In the first task it is that of the attacker's reference, where there is one; else the one that most triggered
        inputs fall into.
        """
        kind = self.plan.classifiers[0]
        found = [
            [most_frequent(self.kept[i][kind].predict(stamped.numpy())) for stamped in features.stamped]
            for i, features in enumerate(self.before)
        ]
        references = [self.implant.target_reference, *(r for _, r in self.implant.others)]
        for j in range(len(self.triggers)):
            if references[j] is not None:
                found[0][j] = int(self.kept[0][kind].predict(self.backdoored.encode([references[j]]).numpy())[0])
        return found

    def victims(self, task: int, target: int) -> np.ndarray:
        """Rows of a task's test inputs that an attack is measured on: those of other classes, or of its source class."""
        truth, source = self.tasks[task].test.labels, self.implant.source_class
        return np.flatnonzero(truth != target if source is None or task else truth == source)

    def reports(self, count: int = 1) -> list[BugInstance]:
        """`count` reports for each trigger: a test input that it sends to its class, and a clean one of the same true class.

        They are kept with the implant: which inputs are flipped depends on the last bit of a classifier, and all methods must
        get the same reports.
        """
        bugs = []
        for number in range(len(self.triggers)):
            folders = [self.folder / "reports" / f"{number}-{i}" for i in range(count)]
            if not folders[-1].exists():
                for bug, folder in zip(self._drawn_reports(number, count), folders, strict=True):
                    bug.save(folder)
            bugs += [BugInstance.load(folder) for folder in folders]
        return bugs

    def flipped(self, number: int = 0) -> FlippedInputs:
        """What a trigger does to the test inputs of the first task."""
        before, target = self.before[0], self.targets[0][number]
        kept, truth = self.kept[0][self.plan.classifiers[0]], self.tasks[0].test.labels
        return flipped_inputs(kept, before.test, before.stamped[number], truth, target, self.victims(0, target))

    def _drawn_reports(self, number: int, count: int) -> list[BugInstance]:
        """`count` reports for one trigger."""
        inputs, flipped = self.tasks[0].test.inputs, self.flipped(number)
        pairs = list(islice(flipped.pairs(self.seed + 100 * number), count))
        if len(pairs) < count:
            raise ImplantError(
                f"Only {len(pairs)} test inputs are sent to class {flipped.target} by {self.attack.name}; {count} reports are "
                "needed."
            )
        return [
            BugInstance(
                self.backdoored.stamp(self.triggers[number], inputs[row]),
                inputs[reference],
                name=f"{self.attack.name}-{number}-{i}",
            )
            for i, (row, reference) in enumerate(pairs)
        ]


def kept_cases(
    output_dir: str | Path, encoder: str | None = None, attacks: Sequence[str] | None = None
) -> Iterator[Case]:
    """The implants that a benchmark has made, one after another.

    Args:
        output_dir (`str` or `Path`): Folder of the benchmark.
        encoder (`str`, *optional*): Name of an encoder of its plan; the first when absent.
        attacks (`Sequence[str]`, *optional*): Names of attacks; all when absent.

    Raises:
        ValueError: If there is no plan, or there are no implants of that kind.
    """
    folder = Path(output_dir)
    if not (folder / PLAN_FILE).exists():
        raise ValueError(f"`{folder}` holds no benchmark. Make one: `mudjack benchmark --config ... --implants-only`.")
    plan = replace(BenchmarkPlan.read(folder / PLAN_FILE), output_dir=str(folder))
    encoder = encoder or next(iter(plan.encoders))
    sources = Sources(plan, encoder, disable_tqdm=True)
    found = False
    for facts in sorted((folder / IMPLANTS_FOLDER / encoder).glob(f"*/{_FACTS_FILE}")):
        attack, _, seed = facts.parent.name.rpartition("-")
        kept = "triggers" in json.loads(facts.read_text(encoding="utf-8"))
        if kept and (attacks is None or attack in attacks):
            found = True
            yield Case(sources, Cell(encoder, attack, int(seed), "none"))
    if not found:
        which = "implants" if attacks is None else f"implants of {', '.join(attacks)}"
        raise ValueError(
            f"`{folder}` holds no {which} in the encoder `{encoder}`. Make them: `mudjack benchmark --implants-only`."
        )


def _opened(path: Path) -> Image.Image | None:
    """A picture, or `None` if there is none: triggers of texts have no reference."""
    if not path.exists():
        return None
    with Image.open(path) as image:
        return image.convert("RGB")
