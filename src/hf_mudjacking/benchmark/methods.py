# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""The methods of a benchmark: each takes a case and gives a repaired encoder with what it cost."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import LoraConfig
from transformers import TrainerCallback, TrainerControl, TrainerState

from ..config import MudjackingConfig
from ..encoder import Encoder
from ..inversion import InvertedTrigger
from ..peers import PEERS
from ..trainer import MudjackingTrainer
from ..triggers import Trigger
from .case import Case
from .plan import OWN_METHODS
from .rates import rates_on_the_way


_PEERS = {peer.name: peer for peer in PEERS}
# Settings of a method that are not of the trainer's configuration.
_OF_THE_METHOD = ("reports", "clean_inputs", "lora", "measure_at")


@dataclass(frozen=True)
class Repaired:
    """What a method made of a case.

    Args:
        encoder (`Encoder`): The repaired encoder.
        steps (`int`): Optimiser steps.
        forward_equivalents (`int`): Inputs that went through a model; a backward pass counts as two more.
        seconds (`float`): Wall time, without what was measured on the way.
        inversion_seconds (`float`): The part of it that went into the inversion, where it can be told.
        inversion_forwards (`int`): The same in forward passes.
        triggers (`list[dict]`): What was found, with its evidence.
        curve (`list[dict]`): What was measured on the way.
        inversion (`InvertedTrigger`, *optional*): That of the first report, for a picture.
    """

    encoder: Encoder
    steps: int = 0
    forward_equivalents: int = 0
    seconds: float = 0.0
    inversion_seconds: float = 0.0
    inversion_forwards: int = 0
    triggers: list[dict[str, Any]] = field(default_factory=list)
    curve: list[dict[str, Any]] = field(default_factory=list)
    inversion: InvertedTrigger | None = None


class Curve:
    """Rates on the way, measured at some steps; the time that takes does not count.

    Args:
        case (`Case`): The case.
        at (`list[int]`): Steps after which to measure.
    """

    def __init__(self, case: Case, at: list[int]) -> None:
        self.case = case
        self.at = set(at)
        self.points: list[dict[str, Any]] = []
        self.started = time.perf_counter()
        self.measuring = 0.0

    def seconds(self) -> float:
        """Wall time so far without measuring."""
        return time.perf_counter() - self.started - self.measuring

    def after_step(self, encoder: Encoder, steps: int, forward_equivalents: int) -> None:
        """Measure, if it is time."""
        if steps not in self.at:
            return
        seconds, began = self.seconds(), time.perf_counter()
        cost = {"steps": steps, "forward_equivalents": forward_equivalents, "seconds": round(seconds, 2)}
        self.points.append({**cost, **rates_on_the_way(self.case, encoder)})
        self.measuring += time.perf_counter() - began


class _MeasureOnTheWay(TrainerCallback):
    def __init__(self, curve: Curve, trainer: MudjackingTrainer) -> None:
        self.curve = curve
        self.trainer = trainer

    def on_step_end(self, args: MudjackingConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.curve.after_step(self.trainer.encoder, state.global_step, self.trainer.forward_equivalents)


def repair(case: Case, method: str, settings: dict[str, Any]) -> Repaired:
    """Run a method against a case.

    Args:
        case (`Case`): The case; its encoder is not changed.
        method (`str`): Name of a method of this library, or of a peer.
        settings (`dict`): Its settings. `clean_inputs` limits the clean inputs, `measure_at` lists steps after which rates are
            measured; methods of this library also know `reports` (for each trigger) and `lora` (arguments of a
            `LoraConfig`), and take the rest for their [`MudjackingConfig`].

    Returns:
        `Repaired`: Encoder and cost.
    """
    if method == "none":
        return Repaired(case.backdoored)
    run: Callable[..., Repaired] = _own if method in OWN_METHODS else _peer
    return run(case, method, settings)


def _own(case: Case, method: str, settings: dict[str, Any]) -> Repaired:
    curve = Curve(case, settings.get("measure_at", []))
    given = {name: value for name, value in settings.items() if name not in _OF_THE_METHOD}
    if "clean_inputs" in settings:
        given["max_inputs"] = settings["clean_inputs"]
    reports = case.reports(settings.get("reports", 1))
    known = [e for e in case.triggers for _ in range(len(reports) // len(case.triggers))]
    with tempfile.TemporaryDirectory() as folder:
        trainer = MudjackingTrainer(
            # Another copy than the one that is measured as it was
            model=case.fresh_model(),
            args=MudjackingConfig(
                output_dir=folder,
                seed=case.seed,
                save_strategy="no",
                report_to="none",
                dataloader_pin_memory=torch.cuda.is_available(),
                disable_tqdm=case.sources.disable_tqdm,
                feature_source=case.backdoored.feature_source,
                **{"on_unverified": "patch", "locality_budget": None, **given},
            ),
            bug_instances=reports,
            train_dataset=case.sources.clean_dataset(),
            processing_class=case.backdoored.processing_class,
            peft_config=LoraConfig(**settings["lora"]) if "lora" in settings else None,
            triggers=known if method == "oracle_trigger" else None,
        )
        trainer.add_callback(_MeasureOnTheWay(curve, trainer))
        if method != "oracle_trigger":
            trainer.invert_triggers()
        inversion_seconds = curve.seconds()
        trainer.train()
        seconds = curve.seconds()
    found = [
        _found(trigger if trigger is not None else trainer.inversions[i].trigger, known[i])
        for i, trigger in enumerate(trainer.triggers)
    ]
    for fact, inversion, screening in zip(found, trainer.inversions, trainer.screenings, strict=False):
        numbers = ("score", "control", "evidence")
        fact |= {name: round(getattr(inversion, name), 4) for name in numbers}
        fact |= {"forwards": inversion.forwards, "verdict": screening.verdict}
    return Repaired(
        trainer.encoder,
        trainer.state.global_step,
        trainer.forward_equivalents,
        seconds,
        inversion_seconds if trainer.inversions else 0.0,
        trainer.inversion_forwards,
        found,
        curve.points,
        trainer.inversions[0] if trainer.inversions else None,
    )


def _peer(case: Case, method: str, settings: dict[str, Any]) -> Repaired:
    if method == "official" and len(case.triggers) > 1:
        raise ValueError(f"`official` takes one report, and `{case.attack.name}` has {len(case.triggers)} triggers.")
    curve = Curve(case, settings.get("measure_at", []))
    given = {name: value for name, value in settings.items() if name not in _OF_THE_METHOD}
    inputs = list(case.sources.clean_inputs(settings.get("clean_inputs"), case.seed))
    curve.started = time.perf_counter()
    result = _PEERS[method].repair(
        case.backdoored,
        inputs,
        case.reports()[0],
        seed=case.seed,
        disable_tqdm=case.sources.disable_tqdm,
        after_step=lambda model, *cost: curve.after_step(case.backdoored.with_model(model), *cost),
        **given,
    )
    return Repaired(
        case.backdoored.with_model(result.model),
        result.steps,
        result.forward_equivalents,
        curve.seconds(),
        triggers=[] if result.trigger is None else [_found(result.trigger, case.triggers[0])],
        curve=curve.points,
    )


def _found(trigger: Trigger, true: Trigger) -> dict[str, Any]:
    """Kind and description of an inverted trigger and, where both are of one kind, how it agrees with the true one."""
    agreement = trigger.overlap(true) if trigger.kind == true.kind else {}
    return {"kind": trigger.kind, "description": trigger.describe(), **agreement}
