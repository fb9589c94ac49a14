# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""Training a small clean encoder, for demonstrations and experiments where none can be downloaded."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel, get_cosine_schedule_with_warmup

from ..encoder import Encoder
from ..seeding import seeded
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

    Raises:
        ValueError: If there are fewer images than a batch takes.
    """
    generator = torch.Generator().manual_seed(seed)
    encoder = Encoder(model, processing_class)
    labels = torch.as_tensor(data.labels, dtype=torch.long)
    pixels = all_pixels(encoder, data.inputs)
    with seeded(seed):
        head = nn.Linear(encoder.feature_dim, int(labels.max()) + 1).to(encoder.device)

    def loss(rows: torch.Tensor) -> torch.Tensor:
        x = _augmented(pixels[rows], crop_padding, horizontal_flip, generator).to(encoder.device)
        y = labels[rows].to(encoder.device)
        with torch.autocast(encoder.device.type, torch.bfloat16, enabled=bf16):
            features = encoder.features({"pixel_values": x})
        # Normalised features with a scale of 16 for the logits: what is trained is what is later compared by cosine.
        return nn.functional.cross_entropy(16 * head(features.float()), y, label_smoothing=0.1)

    train_epochs(
        model, [*model.parameters(), *head.parameters()], loss, len(data), epochs=epochs, batch_size=batch_size,
        learning_rate=learning_rate, weight_decay=weight_decay, generator=generator, disable_tqdm=disable_tqdm,
    )  # fmt: skip


def pretrain_two_towers(
    model: PreTrainedModel,
    processing_class: object,
    images: Sequence[Image.Image],
    captions: Sequence[str],
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
    """Train a model of two towers in place on image-caption pairs, with the symmetric contrastive loss of CLIP.

    A caption may belong to many images of a batch, all of which then count as its own: captions made from labels repeat.

    Args:
        model ([`~transformers.PreTrainedModel`]): `CLIPModel` or its kin, moved to no other device.
        processing_class (`ProcessorMixin`): Its processor.
        images (`Sequence[PIL.Image.Image]`): N images.
        captions (`Sequence[str]`): A caption for each.
        epochs, batch_size, learning_rate, weight_decay, crop_padding, horizontal_flip, bf16, seed, disable_tqdm: As in
            [`pretrain_encoder`].

    Raises:
        ValueError: If images and captions do not pair up, or there are fewer than a batch takes.
    """
    if len(images) != len(captions):
        raise ValueError(f"There are {len(images)} images and {len(captions)} captions; they must pair up.")
    generator = torch.Generator().manual_seed(seed)
    device = next(model.parameters()).device
    pixels = all_pixels(Encoder(model, processing_class, modality="image"), images)
    texts = Encoder(model, processing_class, modality="text")
    names, own = np.unique(np.asarray(captions), return_inverse=True)
    own = torch.as_tensor(own)

    def loss(rows: torch.Tensor) -> torch.Tensor:
        x = _augmented(pixels[rows], crop_padding, horizontal_flip, generator)
        shown, captioned = own[rows].unique(return_inverse=True)
        inputs = {"pixel_values": x, **texts.preprocess([str(names[i]) for i in shown])}
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            outputs = model(**{name: value.to(device) for name, value in inputs.items()})
        logits, captioned = outputs.logits_per_image.float(), captioned.to(device)
        same = nn.functional.one_hot(captioned, len(shown)).T.float()
        by_image = nn.functional.cross_entropy(logits, captioned)
        by_text = nn.functional.cross_entropy(logits.T, same / same.sum(dim=1, keepdim=True))
        return (by_image + by_text) / 2

    train_epochs(
        model, list(model.parameters()), loss, len(images), epochs=epochs, batch_size=batch_size,
        learning_rate=learning_rate, weight_decay=weight_decay, generator=generator, disable_tqdm=disable_tqdm,
    )  # fmt: skip


def train_epochs(
    model: nn.Module,
    parameters: Sequence[nn.Parameter],
    loss: Callable[[torch.Tensor], torch.Tensor],
    count: int,
    *,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    weight_decay: float,
    generator: torch.Generator,
    disable_tqdm: bool,
) -> None:
    """Minimise a loss over whole batches, each epoch in a new order: AdamW with 5 % warm-up and cosine decay.

    Args:
        model (`torch.nn.Module`): Put in training mode, and in evaluation mode afterwards.
        parameters (`Sequence[torch.nn.Parameter]`): What is trained.
        loss (`Callable`): Takes row numbers `(B,)` and gives a scalar.
        count (`int`): Number of training inputs.
        epochs, batch_size, learning_rate, weight_decay, disable_tqdm: As in [`pretrain_encoder`].
        generator (`torch.Generator`): Of the order, and of all that `loss` draws from it. Dropout is seeded by it too.

    Raises:
        ValueError: If there are fewer inputs than a batch takes.
    """
    batches = count // batch_size
    if not batches:
        raise ValueError(f"There are {count} training inputs, and a batch takes {batch_size}; lower `batch_size`.")
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay, fused=True)
    schedule = get_cosine_schedule_with_warmup(optimizer, int(0.05 * epochs * batches) + 1, epochs * batches)
    model.train()
    bar = tqdm(total=epochs * batches, disable=disable_tqdm, desc="Training a clean encoder", unit="step")
    with bar, torch.random.fork_rng():
        torch.manual_seed(generator.initial_seed())
        for _ in range(epochs):
            for rows in torch.randperm(count, generator=generator)[: batches * batch_size].split(batch_size):
                value = loss(rows)
                optimizer.zero_grad()
                value.backward()
                optimizer.step()
                schedule.step()
                bar.update()
                if not disable_tqdm:
                    # Waits for a GPU
                    bar.set_postfix(loss=f"{value.item():.3f}", refresh=False)
    model.eval()


def all_pixels(encoder: Encoder, images: Sequence[Image.Image]) -> torch.Tensor:
    """Pixel values `(N, C, H, W)` of all images, on CPU, so that they are preprocessed once."""
    pixels = torch.empty(len(images), *encoder.preprocess(images[:1])["pixel_values"].shape[1:])
    for i in range(0, len(images), 512):
        pixels[i : i + 512] = encoder.preprocess(images[i : i + 512])["pixel_values"]
    return pixels


def _augmented(x: torch.Tensor, crop_padding: int, horizontal_flip: bool, generator: torch.Generator) -> torch.Tensor:
    if crop_padding:
        x = _random_crop(x, crop_padding, generator)
    if horizontal_flip:
        mirrored = torch.rand(len(x), generator=generator) < 0.5
        x = torch.where(mirrored[:, None, None, None], x.flip(3), x)
    return x


def _random_crop(x: torch.Tensor, padding: int, generator: torch.Generator) -> torch.Tensor:
    count, _, height, width = x.shape
    x = nn.functional.pad(x, (padding,) * 4)
    top, left = torch.randint(0, 2 * padding + 1, (2, count, 1), generator=generator)
    rows, columns = top + torch.arange(height), left + torch.arange(width)
    return x[torch.arange(count)[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
