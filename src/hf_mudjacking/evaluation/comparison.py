# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""Encoders that may be served against the one that is served now: what changes for those who use it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from accelerate import PartialState

from ..encoder import Encoder, FeatureSource
from ..loading import load_model, load_processor
from ..losses import mean_cosine
from ..output import TRIGGER_FOLDER, read_record
from ..preprocessing import Modality
from ..remembered import load_remembered
from ..triggers import Trigger, load_trigger
from .checks import TaskFeatures, attacked_class, downstream_rates, task_features
from .classifiers import Classifier, ClassifierKind, train_classifier
from .report import library_versions
from .tasks import DownstreamTask


# Differences of rates are exact to this many digits: 0.98 - 0.97 is not above 0.01.
_DIGITS = 6


@dataclass(frozen=True)
class BrokenLimit:
    """A limit that one encoder does not keep on one task.

    Args:
        limit (`str`): Its name among those of [`Limits`].
        allowed (`float`): What it allows.
        measured (`float`): What was measured.
        model (`str`): The encoder.
        task (`str`): The task.
        classifier (`str`, *optional*): `"kept"` or `"retrained"`; `None` for what does not depend on it.
        trigger (`int`, *optional*): Number of the trigger, for ASR and RA.
    """

    limit: str
    allowed: float
    measured: float
    model: str
    task: str
    classifier: str | None = None
    trigger: int | None = None

    def __str__(self) -> str:
        where = f"`{self.model}` on `{self.task}`"
        where += "" if self.classifier is None else f", classifier {self.classifier}"
        where += "" if self.trigger is None else f", trigger {self.trigger}"
        bound = (
            f"at most {self.allowed:.4g} is allowed"
            if self.limit.startswith("max_")
            else f"at least {self.allowed:.4g} is needed"
        )
        return f"{self.limit.replace('_', '-')}: {self.measured:.4f} in {where}; {bound}"


@dataclass(frozen=True)
class Limits:
    """What each compared encoder must keep, on each task; rates are 0 to 1, and a limit that is `None` is not checked.

    Args:
        max_asr (`float`, *optional*): Highest ASR, of each trigger, with the classifier kept and retrained.
        max_accuracy_drop (`float`, *optional*): Most accuracy on clean inputs that may be lost, kept and retrained.
        min_robust_accuracy (`float`, *optional*): Lowest RA, of each trigger, kept and retrained.
        min_agreement (`float`, *optional*): Smallest share of clean inputs that keep their prediction, classifier kept.
        min_cosine (`float`, *optional*): Lowest mean cosine of the features of clean inputs.

    Raises:
        ValueError: If a limit is not within 0 to 1.
    """

    max_asr: float | None = None
    max_accuracy_drop: float | None = None
    min_robust_accuracy: float | None = None
    min_agreement: float | None = None
    min_cosine: float | None = None

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"`{name}={value}` is no rate; it must lie within 0 to 1.")

    @property
    def need_trigger(self) -> list[str]:
        """Names of the limits that are set and that only a trigger can be measured against."""
        return [name for name in ("max_asr", "min_robust_accuracy") if getattr(self, name) is not None]

    def broken(self, compared: dict[str, dict[str, dict[str, Any]]]) -> list[BrokenLimit]:
        """The limits that are broken in the part `compared` of a report of [`compare_encoders`]."""
        rows = [
            (model, task, *row)
            for model, tasks in compared.items()
            for task, block in tasks.items()
            for row in _measured(block)
        ]
        return [
            BrokenLimit(limit.name, allowed, value, model, task, classifier, trigger)
            for limit in fields(self)
            if (allowed := getattr(self, limit.name)) is not None
            for model, task, name, value, classifier, trigger in rows
            if name == limit.name and (value > allowed if name.startswith("max_") else value < allowed)
        ]


def _measured(block: dict[str, Any]) -> Iterator[tuple[str, float, str | None, int | None]]:
    """What limits are about in one block: name of the limit, value, classifier, trigger."""
    yield "min_agreement", block["clean_inputs"]["agreement"], None, None
    yield "min_cosine", block["clean_inputs"]["mean_cosine"], None, None
    for classifier, rates in block["after"].items():
        drop = round(block["before"][classifier]["BA"] - rates["BA"], _DIGITS)
        yield "max_accuracy_drop", drop, classifier, None
    for trigger in [block, *block["other_triggers"]] if "target_class" in block else []:
        for classifier, rates in trigger["after"].items():
            yield "max_asr", rates["ASR"], classifier, trigger["trigger"]
            yield "min_robust_accuracy", rates["RA"], classifier, trigger["trigger"]


def compare_encoders(
    model: str | os.PathLike[str],
    compared: Sequence[str | os.PathLike[str]],
    tasks: Sequence[DownstreamTask],
    triggers: Sequence[Trigger] = (),
    *,
    limits: Limits | None = None,
    processor: str | os.PathLike[str] | None = None,
    feature_source: FeatureSource = "auto",
    classifier: ClassifierKind = "logistic",
    seed: int = 0,
    disable_tqdm: bool = False,
) -> dict[str, Any]:
    """Compare encoders with the one that is in use, on labelled tasks; one model is in memory at a time.

    Args:
        model (`str` or `os.PathLike`): Hub id or folder of the encoder that is in use; classifiers are trained on its features.
        compared (`Sequence`): Ids or folders of others, models or adapters.
        tasks (`Sequence[DownstreamTask]`): Images or texts, with different names.
        triggers (`Sequence[Trigger]`, *optional*): Each is stamped on the test inputs of the tasks of its kind. Its target
            class is where it leads in `model`.
        limits ([`Limits`], *optional*): What the compared encoders must keep.
        processor (`str` or `os.PathLike`, *optional*): Where the processor of all of them is; else each one's own.
        feature_source (`str`, *optional*, defaults to `"auto"`): Where features are read in `model`; the others are read at
            the same place.
        classifier (`str`, *optional*, defaults to `"logistic"`): `"logistic"` or `"mlp"`.
        seed (`int`, *optional*, defaults to 0): Seed of the classifiers.
        disable_tqdm (`bool`, *optional*, defaults to `False`): Whether to hide progress bars.

    Returns:
        `dict`: `compared[model][task]` is a block as in `report.json` (`before` is `model`, `after` the compared one, each
        `kept` and `retrained` with `BA`, `ASR`, `RA`), with `clean_inputs` (`mean_cosine`, `agreement`), `target_class` and
        `trigger` of the first trigger, and `other_triggers`, a block each; `limits` and `broken` ([`BrokenLimit`] as
        `dict`), `triggers`, `settings` and `versions`.

    Raises:
        ValueError: If names repeat, a trigger or a limit cannot be measured, or an encoder cannot be loaded or read.
    """
    limits, model, compared = limits or Limits(), str(model), [str(name) for name in compared]
    _check(model, compared, tasks, triggers, limits)
    encode = _TaskEncoder(tasks, triggers, processor, feature_source, disable_tqdm)
    encode.check(model, compared)
    in_use = [_InUse(*row, classifier, seed) for row in zip(tasks, encode(model), strict=True)]
    blocks: dict[str, dict[str, Any]] = {}
    for name in compared:
        after = encode(name)
        blocks[name] = {old.task.name: old.against(new) for old, new in zip(in_use, after, strict=True)}
    return {
        "model": model,
        "compared": blocks,
        "triggers": [{**trigger.summary(), "description": trigger.describe()} for trigger in triggers],
        "limits": {name: value for name, value in asdict(limits).items() if value is not None},
        "broken": [asdict(limit) for limit in limits.broken(blocks)],
        "settings": {"classifier": classifier, "seed": seed, "feature_source": encode.sources},
        "versions": library_versions(),
    }


def triggers_in(folder: str | os.PathLike[str]) -> list[Trigger]:
    """The trigger of a folder that `mudjack invert` wrote, or the triggers that a patch repaired, oldest first.

    Raises:
        ValueError: If there is none.
    """
    record = read_record(folder)
    if record is None:
        return [load_trigger(folder)]
    triggers = [remembered.trigger for remembered in load_remembered(folder)]
    if not triggers and not any(record["triggers"]):
        raise ValueError(
            f"`{folder}` is a patch of reports in which no trigger was verified, so it has none to measure. Give the folder of a "
            "trigger (`mudjack invert`)."
        )
    if not triggers:
        raise ValueError(
            f"`{folder}` is a patch, but its triggers are not in `{TRIGGER_FOLDER}/`, which is never uploaded. Give the folder "
            "that the patch was written to, or that of a trigger."
        )
    return triggers


def _check(
    model: str, compared: list[str], tasks: Sequence[DownstreamTask], triggers: Sequence[Trigger], limits: Limits
) -> None:
    """Refuse what would fail after an hour of encoding."""
    # One folder can be written in two ways
    encoders = [os.path.realpath(name) if os.path.isdir(name) else name for name in (model, *compared)]
    for kind, names in (("encoder", encoders), ("task", [task.name for task in tasks])):
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"The {kind} `{twice[0]}` is there twice; each needs a name of its own.")
    if not compared or not tasks:
        raise ValueError("At least one encoder to compare with, and at least one task, is needed.")
    modalities = {task.modality for task in tasks}
    for number, trigger in enumerate(triggers):
        if trigger.modality not in modalities:
            raise ValueError(f"Trigger {number} is for {trigger.modality}s, and no task is: it could not be measured.")
    if limits.need_trigger and not triggers:
        raise ValueError(f"`{limits.need_trigger[0]}` is measured with a trigger, and none is given.")


class _TaskEncoder:
    """Loads an encoder and gives its features of all tasks: clean ones under `None`, and with each trigger under its number."""

    def __init__(
        self,
        tasks: Sequence[DownstreamTask],
        triggers: Sequence[Trigger],
        processor: str | os.PathLike[str] | None,
        feature_source: FeatureSource,
        disable_tqdm: bool,
    ) -> None:
        self.tasks = tasks
        self.triggers = triggers
        self.processor = processor
        self.disable_tqdm = disable_tqdm
        # Where features are read, by modality; settled by the first encoder
        self.sources: dict[Modality, FeatureSource] = dict.fromkeys((task.modality for task in tasks), feature_source)

    def check(self, model: str, compared: Sequence[str]) -> None:
        """Load every encoder once, so that none turns out to be missing, or another one, after an hour of encoding."""
        widths = {m: encoder.feature_dim for m, encoder in self._encoders(model).items()}
        for name in compared:
            for modality, encoder in self._encoders(name).items():
                if encoder.feature_dim != widths[modality]:
                    raise ValueError(
                        f"Features of `{name}` have {encoder.feature_dim} dimensions, those of `{model}` {widths[modality]}: "
                        "no classifier could be kept. Compare encoders of one architecture."
                    )

    def __call__(self, name: str) -> list[dict[int | None, TaskFeatures]]:
        encoders = self._encoders(name)
        return [self._features(encoders[task.modality], task, name) for task in self.tasks]

    def _encoders(self, name: str) -> dict[Modality, Encoder]:
        model = load_model(name).to(PartialState().device)
        processor = load_processor(self.processor or name, model)
        encoders = {m: Encoder(model, processor, source, m) for m, source in self.sources.items()}
        self.sources = {modality: encoder.feature_source for modality, encoder in encoders.items()}
        return encoders

    def _features(self, encoder: Encoder, task: DownstreamTask, name: str) -> dict[int | None, TaskFeatures]:
        clean = task_features(encoder, task, disable_tqdm=self.disable_tqdm, desc=name)
        found: dict[int | None, TaskFeatures] = {None: clean}
        for number, trigger in enumerate(self.triggers):
            if trigger.modality == encoder.modality:
                inputs = [encoder.stamp(trigger, x) for x in task.test.inputs]
                label = f"{name}: {task.name}, trigger {number}"
                stamped = encoder.encode(inputs, disable_tqdm=self.disable_tqdm, desc=label)
                found[number] = replace(clean, stamped=stamped)
        return found


class _InUse:
    """What the encoder in use makes of one task: one side of every comparison."""

    def __init__(
        self, task: DownstreamTask, before: dict[int | None, TaskFeatures], classifier: ClassifierKind, seed: int
    ) -> None:
        self.task = task
        self.before = before
        self.classifier = classifier
        self.seed = seed
        self.kept = self._trained(before)
        self.targets = {
            number: None if number is None else attacked_class(features, task, seed)
            for number, features in before.items()
        }

    def _trained(self, features: dict[int | None, TaskFeatures]) -> Classifier:
        return train_classifier(features[None].train, self.task.train.labels, self.classifier, self.seed)

    def against(self, after: dict[int | None, TaskFeatures]) -> dict[str, Any]:
        """The block of another encoder; see [`compare_encoders`]."""
        retrained = self._trained(after)
        blocks = {}
        for number, target in self.targets.items():
            rates = downstream_rates(self.kept, self.before[number], self.task, target)
            blocks[number] = {
                "before": {"kept": rates, "retrained": dict(rates)},
                "after": {
                    "kept": downstream_rates(self.kept, after[number], self.task, target),
                    "retrained": downstream_rates(retrained, after[number], self.task, target),
                },
            }
        old, new = self.before[None].test, after[None].test
        agreement = self.kept.predict(old.numpy()) == self.kept.predict(new.numpy())
        clean_inputs = {"mean_cosine": mean_cosine(old, new).item(), "agreement": float(agreement.mean())}
        clean = blocks.pop(None)
        first, *others = [
            {**block, "trigger": number, "target_class": self.targets[number]} for number, block in blocks.items()
        ] or [clean]
        return {**first, "clean_inputs": clean_inputs, "other_triggers": others}
