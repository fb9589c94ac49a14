# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""Parts of speed.py that time training steps, without looking at what they repair."""

from __future__ import annotations

import copy
import io
import os
import statistics
import tempfile
from typing import Any
from unittest import mock

import datasets
import numpy as np
import torch
import torch._inductor.config
from memory import augmented
from PIL import Image
from speed_clock import StepClock, compared, cpu_now, interleaved
from transformers import ViTConfig, ViTModel
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from hf_mudjacking import BugInstance, Encoder, MudjackingConfig, MudjackingTrainer
from hf_mudjacking.callbacks import use_compact_progress
from hf_mudjacking.losses import effectiveness_loss, generalizability_loss, locality_loss, mudjacking_loss
from hf_mudjacking.modes import set_comparison_mode
from hf_mudjacking.named_datasets import load_inputs
from hf_mudjacking.triggers import square_patch


# Name, side of the picture, side of a token, width, layers
SHAPES = {
    "small": ("ViT 4×128, 32 px", 32, 4, 128, 4),
    "large": ("ViT 4×128, 224 px", 224, 16, 128, 4),
    "smaller": ("ViT 4×64, 32 px", 32, 8, 64, 4),
    "smallest": ("ViT 2×64, 32 px", 32, 8, 64, 2),
    "quick": ("ViT 1×16, 32 px", 32, 16, 16, 1),
}


class Bench:
    """A ViT with random weights, noise to patch it on, and a report; made anew, all is the same."""

    def __init__(self, shape: str, count: int) -> None:
        self.name, self.side, token, width, depth = SHAPES[shape]
        torch.manual_seed(0)
        config = ViTConfig(
            hidden_size=width, num_hidden_layers=depth, num_attention_heads=max(width // 64, 1),
            intermediate_size=4 * width, image_size=self.side, patch_size=token,
        )  # fmt: skip
        model = ViTModel(config, add_pooling_layer=False)
        with torch.no_grad():
            # Features that differ from picture to picture, as those of a trained model do
            for parameter in model.parameters():
                if parameter.dim() in (2, 4):
                    parameter.mul_(4)
        self.encoder = Encoder(model, ViTImageProcessorPil(size={"height": self.side, "width": self.side}))
        rng = np.random.default_rng(0)
        shape_ = (self.side, self.side, 3)
        self.images = [Image.fromarray(rng.integers(0, 256, shape_, dtype=np.uint8)) for _ in range(count)]
        self.trigger = square_patch((self.side, self.side), self.side // 5)
        self.bug = BugInstance(self.trigger.apply(self.images[0]), self.images[1])

    def trained(self, steps: int, dataset: datasets.Dataset, **settings: Any) -> tuple[StepClock, float]:
        """Step times and CPU seconds of a run of [`MudjackingTrainer`] that does nothing but steps."""
        clock = StepClock()
        with tempfile.TemporaryDirectory() as folder:
            trainer = MudjackingTrainer(
                model=copy.deepcopy(self.encoder.model),
                args=MudjackingConfig(
                    output_dir=folder,
                    max_steps=steps,
                    reinversions=0,
                    locality_budget=None,
                    stop_when_fixed=False,
                    save_strategy="no",
                    report_to="none",
                    use_cpu=True,
                    disable_tqdm=True,
                    dataloader_pin_memory=False,
                    **settings,
                ),
                bug_instances=[self.bug],
                train_dataset=dataset,
                processing_class=self.encoder.processing_class,
                triggers=[self.trigger],
                callbacks=[clock],
            )
            use_compact_progress(trainer)
            started = cpu_now()
            trainer.train()
        return clock, cpu_now() - started


class Step:
    """One training step on pixels that are ready, with each part of this library's or of the released code's way.

    Args:
        bench (`Bench`): Model and inputs.
        batch (`int`): B clean inputs.
        stored (`bool`): Frozen features are stored; otherwise a second model gives them in every step.
        joint (`bool`): One forward pass of all views; otherwise one for each of the five.
        one_view (`bool`): x_b, x_r and x_r ⊕ e once; otherwise once for each clean input.
        official (`bool`): Besides, augment each view and use SGD.
    """

    def __init__(
        self, bench: Bench, batch: int, *, stored: bool = True, joint: bool = True, one_view: bool = True,
        official: bool = False,
    ) -> None:  # fmt: skip
        self.stored, self.joint, self.official = stored, joint, official
        self.encoder = bench.encoder.with_model(copy.deepcopy(bench.encoder.model))
        self.frozen = bench.encoder
        images = [bench.images[i % len(bench.images)] for i in range(batch)]
        report = [bench.bug.misclassified, bench.bug.reference, bench.trigger.apply(bench.bug.reference)]
        clean, stamped, single = (
            bench.encoder.preprocess(views)["pixel_values"]
            for views in (images, [bench.trigger.apply(x) for x in images], report)
        )
        times = 1 if one_view else batch
        self.views = [clean, stamped, *(view.repeat(times, 1, 1, 1) for view in single.split(1))]
        self.before = [self._frozen_features(i) for i in (0, 3)]
        parameters = self.encoder.model.parameters()
        self.optimizer = (
            torch.optim.SGD(parameters, lr=1e-3, momentum=0.9, weight_decay=5e-4)
            if official
            else torch.optim.AdamW(parameters, lr=3e-4)
        )
        self.generator = torch.Generator().manual_seed(0)
        set_comparison_mode(self.encoder.model)
        set_comparison_mode(self.frozen.model)

    def forward_equivalents(self) -> int:
        """Forward passes of a picture, a backward pass counted as two."""
        again = 0 if self.stored else len(self.views[0]) + len(self.views[3])
        return 3 * sum(map(len, self.views)) + again

    def __call__(self) -> None:
        views = self.views
        if self.official:
            views = [augmented(view, self.generator) for view in views]
        before = self.before if self.stored else [self._frozen_features(i, views) for i in (0, 3)]
        if self.joint:
            features = self.encoder.features({"pixel_values": torch.cat(views)}).split([len(view) for view in views])
        else:
            features = [self.encoder.features({"pixel_values": view}) for view in views]
        clean, stamped, misclassified, reference, stamped_reference = features
        loss = mudjacking_loss(
            effectiveness_loss(misclassified, reference, torch.ones(len(reference))),
            locality_loss(clean, before[0], reference, before[1]),
            generalizability_loss(stamped, clean, stamped_reference, reference),
        ).total
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    @torch.no_grad()
    def _frozen_features(self, number: int, views: list[torch.Tensor] | None = None) -> torch.Tensor:
        return self.frozen.features({"pixel_values": (self.views if views is None else views)[number]})


WAYS: dict[str, dict[str, bool]] = {
    "Stored frozen features": {"stored": False},
    "One joint forward pass": {"joint": False},
    "One view of the report a step": {"one_view": False},
    "All three (without: the released step)": {
        "stored": False, "joint": False, "one_view": False, "official": True,
    },
}  # fmt: skip


def steps(options: Any) -> dict[str, Any]:
    """Our step against the same with one thing left out, and against the released one, at the same batch."""
    cases = [("quick", 4)] if options.small else [("small", 32), ("smaller", 128), ("large", 16)]
    rows = []
    for shape, batch in cases:
        bench = Bench(shape, min(batch, 64))
        ours = Step(bench, batch)
        others = {name: Step(bench, batch, **way) for name, way in WAYS.items()}
        seconds, *slower = interleaved([ours, *others.values()], options.repeats)
        for (name, other), values in zip(others.items(), slower, strict=True):
            passes = [ours.forward_equivalents(), other.forward_equivalents()]
            rows.append(
                {
                    **compared(name, seconds, values, "CPU ms a step", bench.name, batch),
                    "forward_equivalents": passes,
                    "expected_ratio": round(passes[1] / passes[0], 2),
                }
            )
    return {"rows": rows}


def jpeg_pictures(data: str, side: int, count: int) -> datasets.Dataset:
    """Pictures of a labelled set as JPEG files of some side, in memory."""
    found = load_inputs(data)
    column = next(name for name in ("image", "img") if name in found.column_names)
    values = []
    for picture in found.select(range(count))[column]:
        buffer = io.BytesIO()
        picture.convert("RGB").resize((side, side), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
        values.append({"bytes": buffer.getvalue(), "path": None})
    return datasets.Dataset.from_dict({"image": values}, features=datasets.Features({"image": datasets.Image()}))


def data(options: Any) -> dict[str, Any]:
    """Decoding, stamping and preprocessing: in the first epoch, when nothing is kept yet, and in the second and third."""
    cases = [("quick", 64, 16)] if options.small else [("smaller", 256, 32), ("small", 128, 32), ("large", 24, 8)]
    rows, shares = [], []
    for shape, count, batch in cases:
        bench = Bench(shape, 2)
        pictures = jpeg_pictures(options.data, bench.side, count)
        epoch = count // batch
        first, later, model = [], [], []
        for _ in range(options.repeats):
            clock, _ = bench.trained(3 * epoch, pictures, per_device_train_batch_size=batch)
            first.append(statistics.median(clock.data[:epoch]))
            later.append(statistics.median(clock.data[epoch:]))
            model.append(statistics.median(clock.model))
        once, again, step = (statistics.median(values) for values in (first, later, model))
        whole = [[a + m for a, m in zip(values, model, strict=True)] for values in (later, first)]
        rows += [
            compared("Pictures kept: making a batch", later, first, "CPU ms a step", bench.name, batch),
            compared("Pictures kept: a whole step", *whole, "CPU ms a step", bench.name, batch),
        ]
        shares.append(
            {"model": bench.name, "batch": batch, "model_ms": round(1000 * step, 2),
             "data_share_first_epoch": round(once / (once + step), 3),
             "data_share_later": round(again / (again + step), 3)}
        )  # fmt: skip
    return {"rows": rows, "shares": shares}


def precision(options: Any) -> dict[str, Any]:
    """bf16 autocast and `torch.compile` (inductor) against float32 as it is, on CPU, in the whole run and a later step."""
    shape, batch, count = ("quick", 4, 6) if options.small else ("smallest", 32, 40)
    bench = Bench(shape, 64)
    features = datasets.Features({"image": datasets.Image()})
    pictures = datasets.Dataset.from_dict({"image": bench.images}, features=features)
    # A compiler in this process, and one that has to do its work in every repeat
    torch._inductor.config.compile_threads = 1
    torch._inductor.config.force_disable_caches = True
    ways: dict[str, dict[str, Any]] = {"float32": {}, "bf16": {"bf16": True}, "compiled": {"torch_compile": True}}
    later: dict[str, list[float]] = {name: [] for name in ways}
    whole: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(options.repeats):
        for name, settings in ways.items():
            torch.compiler.reset()
            # Both settings leave environment variables behind, which later runs would read
            with mock.patch.dict(os.environ):
                clock, seconds = bench.trained(count, pictures, per_device_train_batch_size=batch, **settings)
            later[name].append(statistics.median(clock.model[count // 2 :]))
            whole[name].append(seconds)
    rows = []
    for name, what in (("bf16", "bf16 autocast"), ("compiled", "torch.compile")):
        label = f"{what}, whole run of {count} steps"
        rows += [
            compared(what, later[name], later["float32"], "CPU ms a step", bench.name, batch),
            compared(label, whole[name], whole["float32"], "CPU ms", bench.name, batch),
        ]
    # What compiling itself took, over what it saves in a step
    saved, spent = (
        statistics.median(b - a for a, b in zip(times["compiled"], times["float32"], strict=True))
        for times in (later, whole)
    )
    pays = round((saved * count - spent) / saved) if saved > 0 else None
    return {"rows": rows, "compile_pays_after_steps": pays}
