# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""The tasks and clean encoders of a plan."""

from __future__ import annotations

import json
import logging
from functools import cached_property
from pathlib import Path

import datasets
import numpy as np
import torch
from accelerate import PartialState
from transformers import AutoConfig, AutoModel
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from ..clean_inputs import CleanInputs, clean_inputs
from ..demo import digits_task
from ..demo_text import minilm
from ..encoder import Encoder
from ..evaluation.classifiers import train_classifier
from ..evaluation.pretraining import pretrain_encoder
from ..evaluation.tasks import DownstreamTask, LabelledInputs
from ..loading import load_model, load_processor
from ..named_datasets import load_labelled
from ..output import staged, write_json
from ..preprocessing import Modality, RawInput
from .plan import BenchmarkPlan, EncoderPlan, TaskPlan
from .simclr import pretrain_contrastive


logger = logging.getLogger(__name__)

# Beside an encoder that was trained here: with what.
_NOTE = "trained_with.json"
# What the tasks' rows are drawn for, each with its own seed.
_CLIENT, _CHECK, _SHADOW, _CLEAN = 1, 2, 3, 4


class TaskSource:
    """One labelled dataset: all its rows, of which every part of a benchmark draws its own.

    Args:
        name (`str`): Name of the task.
        plan (`TaskPlan`): Where it comes from.
    """

    def __init__(self, name: str, plan: TaskPlan) -> None:
        self.name = name
        self.plan = plan

    @cached_property
    def _splits(self) -> dict[str, datasets.Dataset | LabelledInputs]:
        if self.plan.dataset == "digits":
            task = digits_task()
            return {"train": task.train, "test": task.test}
        parts = load_labelled(self.plan.dataset, test_split=self.plan.test_split)
        # CIFAR-10 on the Hub calls its pictures `img`
        renamed = [part.rename_column("img", "image") if "img" in part.column_names else part for part in parts]
        return dict(zip(("train", "test"), renamed, strict=True))

    def load(self) -> None:
        """Load both splits, which is otherwise done when rows are asked for."""
        _ = self._splits

    def drawn(self, split: str, count: int, seed: int) -> LabelledInputs:
        """Up to `count` rows, drawn at random."""
        rows = np.random.default_rng(seed).permutation(len(self._splits[split]))[:count]
        return self._labelled(split, rows)

    def all(self, split: str) -> LabelledInputs:
        """Every row."""
        return self._labelled(split, np.arange(len(self._splits[split])))

    def _labelled(self, split: str, rows: np.ndarray) -> LabelledInputs:
        data = self._splits[split]
        if isinstance(data, LabelledInputs):
            return data.select(rows)
        return LabelledInputs.from_dataset(data.select(rows), self.plan.input_column, self.plan.label_column)

    def client(self) -> DownstreamTask:
        """What a client does with the encoder."""
        parts = (self.drawn("train", self.plan.train, _CLIENT), self.drawn("test", self.plan.test, _CLIENT))
        return DownstreamTask(*parts, self.name)


def check_data(plan: BenchmarkPlan) -> None:
    """Load the data of each task once, as far as the splits.

    Raises:
        ValueError: If one cannot be loaded; the message says where it was looked for.
    """
    for name, task in plan.tasks.items():
        TaskSource(name, task).load()


class Sources:
    """All data of a plan, and one of its clean encoders.

    Args:
        plan (`BenchmarkPlan`): The plan.
        encoder (`str`): Name of the encoder.
        disable_tqdm (`bool`, *optional*, defaults to `False`): Whether to hide progress bars.
    """

    def __init__(self, plan: BenchmarkPlan, encoder: str, disable_tqdm: bool = False) -> None:
        self.plan = plan
        self.disable_tqdm = disable_tqdm
        self.encoder_name = encoder
        self._sources = [TaskSource(name, task) for name, task in plan.tasks.items()]

    @cached_property
    def tasks(self) -> list[DownstreamTask]:
        """The clients' tasks."""
        return [source.client() for source in self._sources]

    @cached_property
    def check(self) -> LabelledInputs:
        """Labelled inputs of the first task on which an implant is checked."""
        return self._sources[0].drawn("test", self.plan.check_inputs, _CHECK)

    @cached_property
    def shadow(self) -> list[LabelledInputs]:
        """The attacker's inputs of each task."""
        return [source.drawn("train", self.plan.shadow_inputs, _SHADOW) for source in self._sources]

    @property
    def modality(self) -> Modality:
        """What the tasks are about."""
        return "text" if isinstance(self.tasks[0].test.inputs[0], str) else "image"

    def clean_dataset(self) -> datasets.Dataset:
        """Clean, unlabelled inputs of all tasks for the repair."""
        inputs = [x for s in self._sources for x in s.drawn("train", self.plan.clean_inputs, _CLEAN).inputs]
        kind = datasets.Image() if self.modality == "image" else datasets.Value("string")
        return datasets.Dataset.from_dict({self.modality: inputs}, features=datasets.Features({self.modality: kind}))

    def clean_inputs(self, count: int | None, seed: int) -> CleanInputs:
        """The same as a sequence, and no more than `count` of them: what `MudjackingTrainer` draws with the same seed."""
        return clean_inputs(self.modality, self.clean_dataset(), count, seed)

    @cached_property
    def clean(self) -> Encoder:
        """The encoder that was never attacked; trained and saved if that has not been done yet."""
        plan = self.plan.encoders[self.encoder_name]
        folder = plan.model
        if plan.model == "minilm":
            encoder = minilm()
            encoder.model.to(self.device)
            return encoder
        if folder is None:
            folder = str(Path(self.plan.output_dir) / "encoders" / self.encoder_name)
            if not (Path(folder) / "config.json").exists():
                self._train(plan, folder)
            self._check_kept(Path(folder))
        model = load_model(folder).to(self.device)
        return Encoder(model, load_processor(folder, model), plan.feature_source, self.modality)

    def _check_kept(self, folder: Path) -> None:
        """Refuse an encoder that an earlier run trained with another plan."""
        note = folder / _NOTE
        if not note.exists():
            logger.warning(
                f"Nothing says with what the encoder in `{folder}` was trained; it is taken for the plan's."
            )
            return
        there = json.loads(note.read_text(encoding="utf-8"))
        wanted = self.plan.encoder_depends_on(self.encoder_name)
        if there != wanted:
            raise ValueError(
                f"The encoder in `{folder}` was trained with {there}, the plan says {wanted}. Remove that folder and what was made of it, or choose another output folder."
            )

    @property
    def device(self) -> torch.device:
        """Where all methods compute, ours and the others."""
        return PartialState().device

    def _train(self, plan: EncoderPlan, folder: str) -> None:
        """Train an encoder on the training inputs of all tasks."""
        torch.manual_seed(0)
        model = AutoModel.from_config(AutoConfig.for_model(plan.model_type, **plan.config))
        side = {"height": plan.image_size, "width": plan.image_size}
        processor = ViTImageProcessorPil(size=side, image_mean=[0.5] * 3, image_std=[0.5] * 3)
        parts, inputs, labels, classes = [source.all("train") for source in self._sources], [], [], 0
        for part in parts:
            inputs.extend(part.inputs)
            labels.append(part.labels + classes)
            classes += int(part.labels.max()) + 1
        train = {"labels": pretrain_encoder, "contrastive": pretrain_contrastive}[plan.objective]
        data = LabelledInputs(inputs, np.concatenate(labels))
        # Convolutions are a third faster so on CPU
        model = model.to(self.device, memory_format=torch.channels_last)
        train(
            model, processor, data if plan.objective == "labels" else data.inputs,
            disable_tqdm=self.disable_tqdm, **plan.training,
        )  # fmt: skip
        model = model.to(memory_format=torch.contiguous_format)
        with staged(folder) as staging:
            model.save_pretrained(staging)
            processor.save_pretrained(staging)
            write_json(staging / _NOTE, self.plan.encoder_depends_on(self.encoder_name))

    @cached_property
    def _sureness(self) -> tuple[list[int], np.ndarray]:
        """Classes, and the probability `(N, C)` of each for the first task's training inputs, by a logistic regression on the
        clean encoder's features."""
        data = self.tasks[0].train
        features = self.clean.encode(data.inputs, disable_tqdm=self.disable_tqdm)
        classifier = train_classifier(features, data.labels)
        return list(classifier.classes_), classifier.predict_proba(features.numpy())

    def surest(self, label: int, rank: int) -> RawInput:
        """The training input of a class of the first task that a classifier on the clean encoder is surest of, or the next."""
        data, (classes, probabilities) = self.tasks[0].train, self._sureness
        of_class = data.labels == label
        own = probabilities[:, classes.index(label)] * of_class
        return data.inputs[int(np.argsort(-own, kind="stable")[rank % of_class.sum()])]
