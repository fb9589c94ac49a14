# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""Training a small clean encoder, for demonstrations and experiments where none can be downloaded."""

from __future__ import annotations

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel, get_cosine_schedule_with_warmup

from ..encoder import Encoder
from .tasks import LabelledInputs


def pretrain_encoder(
    model: PreTrainedModel,
    processing_class: object,
    data: LabelledInputs,
    *,
    epochs: int,
    batch_size: int = 128,
    learning_rate: float = 1e-3,
    weight_decay: float = 0.05,
    crop_padding: int = 0,
    horizontal_flip: bool = False,
    bf16: bool = False,
    seed: int = 0,
    disable_tqdm: bool = False,
) -> None:
    """Train an encoder in place with a linear head on labels; the head is thrown away.

    AdamW with 5 % warm-up and cosine decay, label smoothing 0.1, optional random crops and flips of the preprocessed
    pixels.

    Args:
        model ([`~transformers.PreTrainedModel`]): Vision encoder, moved to no other device.
        processing_class (`BaseImageProcessor`): Its image processor.
        data (`LabelledInputs`): Training images with labels.
        epochs (`int`): Passes over them.
        batch_size (`int`, *optional*, defaults to 128): Images per step.
        learning_rate (`float`, *optional*, defaults to 1e-3): Peak learning rate.
        weight_decay (`float`, *optional*, defaults to 0.05): AdamW's.
        crop_padding (`int`, *optional*, defaults to 0): Pixels of zero padding before random crops; 0 for no crops.
        horizontal_flip (`bool`, *optional*, defaults to `False`): Whether half of the images are mirrored.
        bf16 (`bool`, *optional*, defaults to `False`): Whether to run the forward pass under bfloat16 autocast.
        seed (`int`, *optional*, defaults to 0): Seed of the head, the order and the augmentation.
        disable_tqdm (`bool`, *optional*, defaults to `False`): Whether to hide the progress bar.
    """
    generator = torch.Generator().manual_seed(seed)
    encoder = Encoder(model, processing_class)
    labels = torch.as_tensor(data.labels, dtype=torch.long)
    pixels = torch.cat(
        [encoder.preprocess(data.inputs[i : i + 512])["pixel_values"] for i in range(0, len(data), 512)]
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = nn.Linear(encoder.feature_dim, int(labels.max()) + 1).to(encoder.device)
    # Normalised features with a scale of 16 for the logits: what is trained is what is later compared by cosine.
    parameters = [*model.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay)
    batches = len(data) // batch_size
    schedule = get_cosine_schedule_with_warmup(optimizer, int(0.05 * epochs * batches) + 1, epochs * batches)
    model.train()
    with tqdm(total=epochs * batches, disable=disable_tqdm, desc="Training a clean encoder", unit="step") as bar:
        for _ in range(epochs):
            for rows in torch.randperm(len(data), generator=generator)[: batches * batch_size].split(batch_size):
                x = pixels[rows]
                if crop_padding:
                    x = _random_crop(x, crop_padding, generator)
                if horizontal_flip:
                    mirrored = torch.rand(len(x), generator=generator) < 0.5
                    x = torch.where(mirrored[:, None, None, None], x.flip(3), x)
                x, y = x.to(encoder.device), labels[rows].to(encoder.device)
                with torch.autocast(encoder.device.type, torch.bfloat16, enabled=bf16):
                    features = encoder.features({"pixel_values": x})
                loss = nn.functional.cross_entropy(16 * head(features.float()), y, label_smoothing=0.1)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update()
                bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    model.eval()


def _random_crop(x: torch.Tensor, padding: int, generator: torch.Generator) -> torch.Tensor:
    count, _, height, width = x.shape
    x = nn.functional.pad(x, (padding,) * 4)
    top, left = torch.randint(0, 2 * padding + 1, (2, count, 1), generator=generator)
    rows, columns = top + torch.arange(height), left + torch.arange(width)
    return x[torch.arange(count)[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
