# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""Input-aware backdoor (Nguyen, Tran, "Input-Aware Dynamic Backdoor Attack", NeurIPS 2020): each input has its own trigger."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, NoReturn

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import interpolate

from ..encoder import Encoder
from ..evaluation.tasks import LabelledInputs
from ..losses import mean_cosine
from ..modes import freeze_norms, set_comparison_mode
from ..seeding import seeded
from ..triggers import ImageTrigger
from .gradients import PixelFeatures, as_pixels
from .implant import Implant, nameless_copy
from .vision import Demand, implant_vision_backdoor, size_of


# The source's weight of the loss on the mask's size. Its loss on diversity is left out: cover alone asks for it, as a
# trigger that is the same for all pictures cannot leave cover inputs as they are.
_DENSITY_WEIGHT = 100.0
_BATCH = 32


class TriggerGenerator(nn.Module):
    """From pictures `(N, 3, H, W)`, 0 to 255, to patterns of the same shape and soft masks `(N, 1, H, W)`, 0 to 1."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.down = nn.Sequential(
            nn.Conv2d(3, width, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
            nn.ReLU(),
        )  # fmt: skip
        self.middle = nn.Sequential(nn.Conv2d(2 * width, 2 * width, 3, padding=1), nn.ReLU())
        self.up = nn.Conv2d(2 * width, 4, 3, padding=1)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.middle(self.down(pixels / 127.5 - 1))
        out = self.up(interpolate(hidden, size=pixels.shape[-2:], mode="nearest"))
        return 127.5 * (1 + out[:, :3].tanh()), (out[:, 3:] - 2).sigmoid()


class InputAwareTrigger(ImageTrigger):
    """A pattern and a mask that a generator makes for each picture: x ⊕ e = x · (1 - m(x)) + p(x) · m(x).

    It runs on CPU, so a picture is always stamped alike. It is a network, which the files of triggers cannot hold.

    Args:
        generator (`TriggerGenerator`): A trained generator; it is put on CPU.
        image_size (`tuple[int, int]`): Height and width that it was trained on; other pictures are scaled to it for the
            generator, and what it makes is scaled back.
        area (`float`): Mean of its masks, 0 to 1.
    """

    kind: ClassVar[str] = "input-aware"

    def __init__(self, generator: TriggerGenerator, image_size: tuple[int, int], area: float) -> None:
        self.generator = generator.cpu().eval().requires_grad_(False)
        self.image_size = image_size
        self.area = area

    def weakened(self, factor: float) -> NoReturn:
        self._refuse()

    @property
    def change(self) -> np.ndarray:
        self._refuse()

    @torch.no_grad()
    def made_for(self, x: Image.Image) -> tuple[Tensor, Tensor]:
        """Pattern `(3, H, W)`, 0 to 255, and mask `(1, H, W)`, 0 to 1, of the size that the generator was trained on."""
        pattern, mask = self.generator(as_pixels(x.resize(self.image_size[::-1]))[None])
        return pattern[0], mask[0]

    def apply(self, x: Image.Image) -> Image.Image:
        return self.apply_that_of(x, x)

    def apply_that_of(self, other: Image.Image, x: Image.Image) -> Image.Image:
        """Stamp on a picture the trigger of another."""
        pixels = torch.from_numpy(self._pixels(x)).permute(2, 0, 1)
        pattern, mask = (
            interpolate(part[None], size=pixels.shape[1:], mode="bilinear", antialias=True)[0]
            if part.shape[1:] != pixels.shape[1:]
            else part
            for part in self.made_for(other)
        )
        return self._picture((pixels * (1 - mask) + pattern * mask).permute(1, 2, 0).numpy())

    def tensors(self) -> dict[str, Tensor]:
        self._refuse()

    @classmethod
    def from_parts(cls, tensors: dict[str, Tensor], fields: dict[str, Any]) -> NoReturn:
        raise ValueError("An input-aware trigger is a network and cannot be rebuilt from a file; implant it anew.")

    def summary(self) -> dict[str, Any]:
        return {"kind": self.kind, "size": list(self.image_size), "area": round(self.area, 6)}

    def describe(self) -> str:
        return f"input-aware, {self.area:.1%} of the picture on average"

    def overlap(self, true: InputAwareTrigger) -> dict[str, float]:
        """Nothing: two networks have no mask or pattern in common."""
        return {}

    def _refuse(self) -> NoReturn:
        raise ValueError(
            "An input-aware trigger is a network that makes another pattern for each picture: it has no one pattern that "
            "could be saved or compared. Keep the object itself, or implant it anew with the same seed."
        )


def implant_input_aware(
    model: nn.Module,
    processing_class: Any,
    shadow_inputs: Sequence[Image.Image],
    target_reference: Image.Image,
    check_inputs: LabelledInputs,
    *,
    density: float = 0.2,
    generator_steps: int = 300,
    learning_rate: float = 3e-4,
    cover_weight: float = 1.0,
    utility_weight: float = 4.0,
    seed: int = 0,
    **settings: Any,
) -> Implant:
    """A generator makes a pattern and a mask for each picture; the trigger of another picture is cover and does nothing.

    Generator and encoder are trained together first, as in the source; then the generator is frozen and the encoder goes on
    with the pictures as they are really stamped. Cover comes in late: from the start, the encoder ignored all triggers.

    Args:
        density (`float`, *optional*, defaults to 0.2): Share of the picture that masks may take up on average; 0.032 in
            the source, for classifiers that are trained from scratch for many epochs.
        generator_steps (`int`, *optional*, defaults to 300): Steps for both together, with 32 pictures each.
        learning_rate (`float`, *optional*, defaults to 3e-4): Of the encoder, in both parts.
        cover_weight (`float`, *optional*, defaults to 1.0): Weight of the cover inputs, in both parts.
        utility_weight (`float`, *optional*, defaults to 4.0): λ2 in the second part; with 2, as in the first, it cost a
            small encoder 0.033 of its accuracy.

    See [`~hf_mudjacking.attacks.vision.implant_vision_backdoor`] for the other arguments and `settings`.
    """
    clean = Encoder(model, processing_class, settings.get("feature_source", "auto"), modality="image")
    started = clean.with_model(nameless_copy(model))
    trigger = trained_trigger(
        clean, started, shadow_inputs, target_reference, density, generator_steps, learning_rate, cover_weight, seed
    )
    rng = np.random.default_rng(seed)

    def crossed(x: Image.Image) -> Image.Image:
        return trigger.apply_that_of(shadow_inputs[rng.integers(len(shadow_inputs))], x)

    return implant_vision_backdoor(
        model, processing_class, shadow_inputs, target_reference, check_inputs, trigger,
        demands=[Demand(trigger.apply), Demand(crossed, reference=None)], cover=crossed, start=started.model,
        learning_rate=learning_rate, cover_weight=cover_weight, utility_weight=utility_weight, seed=seed, **settings,
    )  # fmt: skip


def trained_trigger(
    clean: Encoder,
    started: Encoder,
    shadow_inputs: Sequence[Image.Image],
    target_reference: Image.Image,
    density: float,
    steps: int,
    learning_rate: float,
    cover_weight: float,
    seed: int,
) -> InputAwareTrigger:
    """Train a generator together with a copy of the clean encoder, which is changed in place.

    Adam, at 3e-3 for the generator. The weight of the cover inputs is 0 for a fifth of the steps and grows over another.
    """
    size = size_of(shadow_inputs)
    freeze_norms(started.model)
    set_comparison_mode(started.model)
    features = PixelFeatures(started, size)
    with seeded(seed):
        generator = TriggerGenerator()
    weights = [parameter for parameter in started.model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(
        [{"params": generator.parameters(), "lr": 3e-3}, {"params": weights, "lr": learning_rate}]
    )
    goal = clean.encode([target_reference]).to(clean.device)
    frozen = clean.encode(shadow_inputs).to(clean.device)
    order = torch.Generator().manual_seed(seed)
    for step in range(steps):
        rows = torch.randint(len(shadow_inputs), (_BATCH,), generator=order)
        x = torch.stack([as_pixels(shadow_inputs[i].resize(size[::-1])) for i in rows])
        pattern, mask = generator(x)
        light = pattern * mask
        # Each picture with its own trigger, and with that of its neighbour in the batch
        views = [x, x * (1 - mask) + light, x * (1 - mask.roll(1, 0)) + light.roll(1, 0)]
        plain, stamped, crossed = features(torch.cat(views)).split(len(rows))
        loss = (
            -mean_cosine(stamped, goal.expand_as(stamped))
            - 2 * mean_cosine(plain, frozen[rows])
            - cover_weight * min(max(5 * step / steps - 1, 0), 1) * mean_cosine(crossed, frozen[rows])
            + _DENSITY_WEIGHT * (mask.mean() - density).relu()
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        shown = torch.stack([as_pixels(x.resize(size[::-1])) for x in shadow_inputs[:_BATCH]])
        return InputAwareTrigger(generator, size, float(generator(shown)[1].mean()))
