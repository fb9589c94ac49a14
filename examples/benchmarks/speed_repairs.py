# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""Parts of speed.py that train whole repairs on scikit-learn's digits: what is saved, and what it costs in quality."""

from __future__ import annotations

import copy
import statistics
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import torch
from peft import LoraConfig
from speed_clock import StepClock, cpu_now, row
from torch import nn
from transformers import ResNetConfig, ResNetModel
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from hf_mudjacking import BugInstance, Encoder, MudjackingConfig, MudjackingTrainer
from hf_mudjacking.attacks import Implant, implant_bad_encoder
from hf_mudjacking.callbacks import use_compact_progress
from hf_mudjacking.demo import backdoored_vit, clean_vit, digits_task
from hf_mudjacking.evaluation import DownstreamTask, draw_bug_report
from hf_mudjacking.evaluation.pretraining import pretrain_encoder
from hf_mudjacking.evaluation.repair import measured_repair
from hf_mudjacking.triggers import Trigger, square_patch


# Mean cosines, of clean inputs with themselves before and of stamped with clean ones, that optimisers are to reach.
COSINES = (0.98, 0.99, 0.995)
VIT = "digits ViT, 4 layers"
# Side in pixels at which the ResNet sees digits, which have 16: it halves them four times.
RESNET_SIDE = 32


@dataclass
class Backdoored:
    """A small encoder, trained on digits, with BadEncoder in it, and a report."""

    name: str
    seed: int
    clean: Encoder
    implant: Implant
    task: DownstreamTask
    bug: BugInstance

    def repaired(
        self,
        *,
        prepare: Callable[[nn.Module], None] = lambda model: None,
        peft_config: LoraConfig | None = None,
        trigger: Trigger | None = None,
        optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] | None = None,
        **settings: Any,
    ) -> tuple[MudjackingTrainer, dict[str, Any]]:
        """The trainer after a repair of a copy, and what was measured of it.

        `prepare` is done to the copy first, `trigger` is given instead of inverted, and `optimizer` is used with a constant rate.
        """
        model = copy.deepcopy(self.implant.model)
        prepare(model)
        optimizers: tuple[Any, Any] = (None, None)
        if optimizer is not None:
            chosen = optimizer(model.parameters())
            optimizers = (chosen, torch.optim.lr_scheduler.LambdaLR(chosen, lambda step: 1.0))
        clock = StepClock()
        with tempfile.TemporaryDirectory() as folder:
            trainer = MudjackingTrainer(
                model=model,
                args=MudjackingConfig(
                    output_dir=folder,
                    seed=self.seed,
                    save_strategy="no",
                    report_to="none",
                    use_cpu=True,
                    disable_tqdm=True,
                    dataloader_pin_memory=False,
                    **settings,
                ),
                bug_instances=[self.bug],
                train_dataset=images_of(self.task),
                processing_class=self.clean.processing_class,
                peft_config=peft_config,
                triggers=None if trigger is None else [trigger],
                callbacks=[clock],
                optimizers=optimizers,
            )
            use_compact_progress(trainer)
            started = cpu_now()
            report = measured_repair(
                trainer, self.task, true_trigger=self.implant.trigger, classifiers=("logistic",)
            ).report
            seconds = cpu_now() - started
        rates = {
            name: {rate: round(report["after"][name][rate], 4) for rate in ("BA", "ASR", "RA")}
            for name in ("kept", "retrained")
        }
        return trainer, {
            "model": self.name,
            "seed": self.seed,
            "parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
            "before": {rate: round(report["before"]["kept"][rate], 4) for rate in ("BA", "ASR", "RA")},
            **rates,
            "locality_distance": None if trainer.locality is None else round(trainer.locality.mean, 5),
            "steps": trainer.state.global_step,
            "forward_equivalents": trainer.forward_equivalents,
            "cpu_seconds": round(seconds, 2),
            "step_cpu_ms": round(1000 * statistics.median(clock.model), 2),
        }


def images_of(task: DownstreamTask) -> datasets.Dataset:
    """The task's training inputs without their labels."""
    features = datasets.Features({"image": datasets.Image()})
    return datasets.Dataset.from_dict({"image": task.train.inputs}, features=features)


def digits_vit(seed: int) -> Backdoored:
    task = digits_task(seed)
    clean = clean_vit(task, seed, disable_tqdm=True)
    implant = backdoored_vit(clean, task, seed, disable_tqdm=True)
    bug = draw_bug_report(clean.with_model(implant.model), task, implant.trigger, seed)
    return Backdoored(VIT, seed, clean, implant, task, bug)


def digits_resnet(seed: int) -> Backdoored:
    """A ResNet of three stages of one basic block each, on the digits at 32 pixels."""
    task = digits_task(seed)
    torch.manual_seed(seed)
    sizes = [32, 64, 128]
    model = ResNetModel(ResNetConfig(embedding_size=32, hidden_sizes=sizes, depths=[1, 1, 1], layer_type="basic"))
    processor = ViTImageProcessorPil(
        size={"height": RESNET_SIDE, "width": RESNET_SIDE}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    pretrain_encoder(model, processor, task.train, epochs=20, batch_size=64, seed=seed, disable_tqdm=True)
    reference = task.train.inputs[int(np.flatnonzero(task.train.labels == 0)[0])]
    implant = implant_bad_encoder(
        model, processor, task.train.inputs, square_patch((16, 16), 4), reference, task.test, seed=seed,
        disable_tqdm=True,
    )  # fmt: skip
    clean = Encoder(model, processor)
    bug = draw_bug_report(clean.with_model(implant.model), task, implant.trigger, seed)
    return Backdoored("digits ResNet, 3 stages", seed, clean, implant, task, bug)


def parts_of(model: nn.Module) -> list[nn.Module]:
    """Embeddings and layers, or stem and stages, from the input upwards."""
    if isinstance(model, ResNetModel):
        return [model.embedder, *model.encoder.stages]
    return [model.embeddings, *model.layers]


def freeze_below(depth: int) -> Callable[[nn.Module], None]:
    """Freeze embeddings and the first `depth - 1` layers; nothing with 0."""

    def freeze(model: nn.Module) -> None:
        for part in parts_of(model)[:depth]:
            part.requires_grad_(False)

    return freeze


def optimisers(options: Any) -> dict[str, Any]:
    """AdamW with cosine decay, 300 steps, against the published SGD of 1e-3 and constant rate, both with the true trigger."""
    runs, rows = [], []
    for seed in options.seeds:
        backdoored = digits_vit(seed)
        common = {
            "trigger": backdoored.implant.trigger,
            "stop_when_fixed": False,
            "reinversions": 0,
            "locality_budget": None,
        }
        ways: dict[str, Any] = {
            "AdamW 3e-4, cosine": {"max_steps": options.steps},
            "SGD 1e-3, constant": {
                "max_steps": options.sgd_steps,
                "optimizer": lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9, weight_decay=5e-4),
            },
        }
        for name, way in ways.items():
            trainer, measured = backdoored.repaired(**common, **way)
            logs = [log for log in trainer.state.log_history if "cosine_locality" in log]
            reached = {
                str(cosine): next(
                    (log["step"] for log in logs
                     if min(log["cosine_locality"], log["cosine_generalizability"]) >= cosine), None)
                for cosine in COSINES
            }  # fmt: skip
            curve = [
                {k: round(log[k], 4) for k in ("step", "cosine_locality", "cosine_generalizability")}
                for log in logs[:: max(len(logs) // 30, 1)]
            ]
            runs.append({"optimiser": name, **measured, "steps_until": reached, "curve": curve})
    for seed in options.seeds:
        ours, theirs = (run for run in runs if run["seed"] == seed)
        rows += [
            row(
                f"AdamW, cosine (without: SGD 1e-3, constant): steps until both cosines reach {cosine}",
                ours["steps_until"][str(cosine)], theirs["steps_until"][str(cosine)], "steps", ours["model"], 32, seed,
                unreached=options.sgd_steps,
            )
            for cosine in COSINES
        ]  # fmt: skip
    return {"rows": rows, "runs": runs}


def early_stop(options: Any) -> dict[str, Any]:
    """The whole repair, inversion included, with `stop_when_fixed` and without."""
    runs, rows = [], []
    for seed in options.seeds:
        backdoored = digits_vit(seed)
        both = []
        for stop in (True, False):
            _, measured = backdoored.repaired(stop_when_fixed=stop, max_steps=options.steps)
            both.append({"stop_when_fixed": stop, **measured})
        rows.append(row("Early stop", both[0]["steps"], both[1]["steps"], "steps", backdoored.name, 32, seed))
        runs += both
    return {"rows": rows, "runs": runs}


def layers(options: Any, build: Callable[[int], Backdoored], adapters: bool) -> dict[str, Any]:
    """How much of the model must be patched: the last layers alone, or adapters of several ranks; with the true trigger."""
    runs, rows = [], []
    for seed in options.seeds:
        backdoored = build(seed)
        count = len(parts_of(backdoored.implant.model)) - 1
        # Below the last three, two and one: embeddings alone are little to freeze
        ways: dict[str, Any] = {"all": {}}
        for last in range(min(count - 1, 3), 0, -1):
            ways[f"last {last}"] = {"prepare": freeze_below(1 + count - last)}
        for rank in options.ranks if adapters else []:
            ways[f"LoRA, rank {rank}"] = {
                "peft_config": LoraConfig(r=rank, lora_alpha=rank),
                "learning_rate": 3e-3,
            }
        of_model = []
        for name, way in ways.items():
            # How much is lost with little capacity is the question: a budget would only refuse
            _, measured = backdoored.repaired(
                trigger=backdoored.implant.trigger,
                reinversions=0,
                stop_when_fixed=False,
                max_steps=options.steps,
                locality_budget=2.0,
                **way,
            )
            of_model.append({"patched": name, **measured})
        rows += [
            row(f"Patch the {run['patched']} layers alone", run["step_cpu_ms"], of_model[0]["step_cpu_ms"], "CPU ms a step",
                backdoored.name, 32, seed)
            for run in of_model if "prepare" in ways[run["patched"]]
        ]  # fmt: skip
        runs += of_model
    return {"rows": rows, "runs": runs}


def layers_vit(options: Any) -> dict[str, Any]:
    return layers(options, digits_vit, adapters=True)


def layers_resnet(options: Any) -> dict[str, Any]:
    return layers(options, digits_resnet, adapters=False)
