# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""Training a clean vision encoder without labels, as SimCLR does (Chen et al., ICML 2020)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from torch import nn
from torch.nn.functional import normalize
from transformers import PreTrainedModel

from ..encoder import Encoder
from ..evaluation.pretraining import train_epochs
from ..peers.contrastive import nt_xent, two_views
from ..peers.pictures import ModelPictures


def pretrain_contrastive(
    model: PreTrainedModel,
    processing_class: object,
    images: Sequence[Image.Image],
    *,
    epochs: int,
    batch_size: int = 256,
    learning_rate: float = 1e-3,
    weight_decay: float = 1e-6,
    temperature: float = 0.5,
    projection_dim: int = 128,
    bf16: bool = False,
    torch_compile: bool = False,
    seed: int = 0,
    disable_tqdm: bool = False,
) -> None:
    """Train an encoder in place until two views of a picture have like features; the projection head is thrown away.

    Two views of each picture: cropped, mirrored, jittered, sometimes grey. AdamW with 5 % warm-up and cosine decay.

    Args:
        model ([`~transformers.PreTrainedModel`]): Vision encoder, moved to no other device.
        processing_class (`BaseImageProcessor`): Its image processor.
        images (`Sequence[PIL.Image.Image]`): Training images; prepared ones stay on the model's device, 3 · H · W bytes each.
        epochs (`int`): Passes over them; BadEncoder's code takes 1,000 on CIFAR-10.
        batch_size (`int`, *optional*, defaults to 256): Images per step, two views of each.
        learning_rate (`float`, *optional*, defaults to 1e-3): Peak learning rate (BadEncoder's code).
        weight_decay (`float`, *optional*, defaults to 1e-6): AdamW's (BadEncoder's code).
        temperature (`float`, *optional*, defaults to 0.5): τ; the best one for CIFAR-10 in the paper's appendix.
        projection_dim (`int`, *optional*, defaults to 128): Outputs of the head, of one hidden layer as wide as the features.
        bf16 (`bool`, *optional*, defaults to `False`): Whether to run the forward pass under bfloat16 autocast.
        torch_compile (`bool`, *optional*, defaults to `False`): Whether to compile the model.
        seed (`int`, *optional*, defaults to 0): Seed of the head, the order and the views.
        disable_tqdm (`bool`, *optional*, defaults to `False`): Whether to hide the progress bar.

    Raises:
        ValueError: If there are fewer images than a batch takes.
    """
    generator = torch.Generator().manual_seed(seed)
    encoder = Encoder(model, processing_class, modality="image")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        width = encoder.feature_dim
        head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, projection_dim)).to(encoder.device)
    pictures = ModelPictures(encoder)
    views = two_views(pictures, pictures.prepare(images).to(encoder.device), generator)
    compiled = torch.compile(model) if torch_compile else model

    def loss(rows: torch.Tensor) -> torch.Tensor:
        with torch.autocast(encoder.device.type, torch.bfloat16, enabled=bf16):
            projected = head(encoder.features(views(rows), compiled))
        return nt_xent(normalize(projected.float(), dim=1), temperature)

    train_epochs(
        model, [*model.parameters(), *head.parameters()], loss, len(images), epochs=epochs, batch_size=batch_size,
        learning_rate=learning_rate, weight_decay=weight_decay, generator=generator, disable_tqdm=disable_tqdm,
    )  # fmt: skip
