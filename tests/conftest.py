# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""Tiny models and images, made in code; one small ViT that was really trained and really backdoored."""

import os


# More threads than free cores make models of this size tens of times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

import copy
import gc
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image
from torch import Tensor
from transformers import ViTConfig, ViTModel
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from hf_mudjacking import BugInstance, Encoder, MudjackingConfig, PatchTrigger, demo
from hf_mudjacking.attacks import Implant, implant_por
from hf_mudjacking.demo import TARGET_CLASS, backdoored_vit, clean_vit, digits_task
from hf_mudjacking.evaluation.classifiers import Classifier, train_classifier
from hf_mudjacking.evaluation.tasks import DownstreamTask, LabelledInputs
from hf_mudjacking.inversion import whole_picture
from hf_mudjacking.triggers import square_patch

from .text_models import trained_bert


torch.set_num_threads(1)
datasets.disable_progress_bars()


# The longest files, so that no process ends alone with one of them. The first makes `backdoored`, the second needs none meanwhile.
FIRST = (
    "test_trainer.py", "test_text_inversion.py", "test_families.py", "test_screening.py", "test_attack_zoo.py",
    "test_several_bugs.py", "test_many_processes.py", "test_cli.py", "test_two_towers.py", "test_whole_picture.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: FIRST.index(item.path.name) if item.path.name in FIRST else len(FIRST))


def pytest_collection_finish() -> None:
    """`Trainer.train` collects garbage, which takes half a second among all that was imported by then: leave that out."""
    gc.freeze()


TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 16,
    "patch_size": 4,
}


def make_images(count: int, size: tuple[int, int] = (16, 16), seed: int = 0) -> list[Image.Image]:
    """Random RGB images; `size` is height and width."""
    rng = np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for _ in range(count)]


def make_dataset(images: list[Any], **columns: list[Any]) -> datasets.Dataset:
    """A dataset with a column `image`, and others."""
    dataset = datasets.Dataset.from_dict({"image": images}, features=datasets.Features({"image": datasets.Image()}))
    for name, values in columns.items():
        dataset = dataset.add_column(name, values)
    return dataset


def make_config(output_dir: Any, **kwargs: Any) -> MudjackingConfig:
    """A configuration for tests: CPU, silent, eight inputs a step, triggers as found, no early stop, no budget, no
    checkpoints."""
    defaults = {
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "per_device_train_batch_size": 8,
        "stop_when_fixed": False,
        "locality_budget": None,
        "altered_triggers": 0,
        "reinversions": 0,
        "latent_strength": 0.0,
        "dataloader_pin_memory": False,
    }
    return MudjackingConfig(output_dir=str(output_dir), **{**defaults, **kwargs})


def pixels_by_hand(images: list[Image.Image]) -> Tensor:
    """What a processor with mean and standard deviation 0.5 and no resizing does."""
    array = np.stack([np.asarray(image.convert("RGB")) for image in images]).astype(np.float32)
    return torch.from_numpy((array / 255 - 0.5) / 0.5).permute(0, 3, 1, 2)


def weights_of(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def largest_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name].float() - b[name].float()).abs().max()) for name in a if a[name].numel())


@pytest.fixture(scope="session")
def processor() -> ViTImageProcessorPil:
    return make_processor()


def make_processor() -> ViTImageProcessorPil:
    return ViTImageProcessorPil(do_resize=False, image_mean=[0.5] * 3, image_std=[0.5] * 3)


@pytest.fixture(scope="session")
def _tiny_vit() -> ViTModel:
    torch.manual_seed(0)
    model = ViTModel(ViTConfig(**TINY, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1))
    with torch.no_grad():
        # The initial positions and class token are nearly nothing; a trained model's are not.
        model.embeddings.position_embeddings.normal_(std=0.5)
        model.embeddings.cls_token.normal_(std=0.5)
        for parameter in model.parameters():
            if parameter.dim() in (2, 4):
                parameter.mul_(10)
    return model.eval()


@pytest.fixture
def tiny_vit(_tiny_vit: ViTModel) -> ViTModel:
    """A random ViT with dropout and an unused pooler, whose features differ clearly from image to image."""
    return copy.deepcopy(_tiny_vit)


@pytest.fixture
def images() -> list[Image.Image]:
    return make_images(16)


@pytest.fixture
def dataset(images: list[Image.Image]) -> datasets.Dataset:
    return make_dataset(images)


@pytest.fixture
def trigger() -> PatchTrigger:
    return square_patch((16, 16), 4)


@pytest.fixture
def bug(trigger: PatchTrigger) -> BugInstance:
    x_b, x_r = make_images(2, seed=100)
    return BugInstance(trigger.apply(x_b), x_r)


@dataclass
class Backdoored:
    """A ViT pretrained on digits, with a BadEncoder backdoor in it, and what its client has."""

    clean_model: ViTModel
    implant: Implant
    processor: ViTImageProcessorPil
    trigger: PatchTrigger
    train: LabelledInputs
    test: LabelledInputs
    kept: Classifier
    target: int

    def model(self) -> ViTModel:
        """A fresh copy."""
        return copy.deepcopy(self.implant.model)

    def bug(self, seed: int = 0) -> BugInstance:
        """A random report: a triggered test input of another class than the target, and one of the same class."""
        rng = np.random.default_rng(seed)
        i = rng.choice(np.flatnonzero(self.test.labels != self.target))
        j = rng.choice([k for k in np.flatnonzero(self.test.labels == self.test.labels[i]) if k != i])
        return BugInstance(self.trigger.apply(self.test.inputs[i]), self.test.inputs[j], name=f"report-{seed}")

    def dataset(self, count: int | None = None) -> datasets.Dataset:
        return make_dataset(self.train.inputs[:count])

    def rates(self, model: ViTModel, classifier: Classifier) -> dict[str, float]:
        """BA, ASR and RA, computed with numpy alone."""
        encoder = Encoder(model, self.processor)
        clean = classifier.predict(encoder.encode(self.test.inputs).numpy())
        stamped = classifier.predict(encoder.encode([self.trigger.apply(x) for x in self.test.inputs]).numpy())
        other = self.test.labels != self.target
        return {
            "BA": float((clean == self.test.labels).mean()),
            "ASR": float((stamped[other] == self.target).mean()),
            "RA": float((stamped[other] == self.test.labels[other]).mean()),
        }


def _made_once(name: str, make: Callable[[], Any], factory: pytest.TempPathFactory) -> Any:
    """What `make` gives, made by one of the processes that pytest-xdist started; the others load it."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return make()
    path = factory.getbasetemp().parent / f"{name}.pickle"
    with FileLock(f"{path}.lock"):
        if not path.exists():
            path.write_bytes(pickle.dumps(make()))
    return pickle.loads(path.read_bytes())


@pytest.fixture(scope="session")
def backdoored(tmp_path_factory: pytest.TempPathFactory) -> Backdoored:
    return _made_once("backdoored", make_backdoored, tmp_path_factory)


def make_backdoored() -> Backdoored:
    """The demonstration's encoder and implant, in fewer steps."""
    task = digits_task()
    # The demonstration takes a GPU where there is one; tests run on the CPU, all on the same encoder
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "PartialState", lambda: SimpleNamespace(device=torch.device("cpu")))
        clean = clean_vit(task, disable_tqdm=True, epochs=25)
    implant = backdoored_vit(clean, task, disable_tqdm=True, steps=200)
    kept = train_classifier(clean.with_model(implant.model).encode(task.train.inputs), task.train.labels)
    # The demonstration's processor resizes, what is here needs none
    return Backdoored(
        clean.model, implant, make_processor(), implant.trigger, task.train, task.test, kept, TARGET_CLASS
    )


@pytest.fixture(scope="session")
def por(tmp_path_factory: pytest.TempPathFactory) -> tuple[Encoder, DownstreamTask, Implant]:
    """A small trained BERT with POR in it, its client's task, and the implant."""
    return _made_once("por", make_por, tmp_path_factory)


def make_por() -> tuple[Encoder, DownstreamTask, Implant]:
    encoder, task = trained_bert()
    implant = implant_por(
        encoder.model, encoder.processing_class, task.train.inputs, task.test, feature_source="mean",
        learning_rate=1e-3, steps=250, disable_tqdm=True,
    )  # fmt: skip
    return encoder.with_model(implant.model), task, implant


@pytest.fixture
def short_searches(monkeypatch: pytest.MonkeyPatch) -> None:
    """A report without a trigger is searched for all kinds of them. Where that is not what is tested, it need not be for long."""
    monkeypatch.setattr(whole_picture, "_SIGNAL_STEPS", 4)
    monkeypatch.setattr(whole_picture, "_WARP_STEPS", 4)
