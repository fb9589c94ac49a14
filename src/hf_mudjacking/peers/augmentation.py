# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""Random views of pictures: mirrored, recoloured, grey, cropped; a batch at a time.

Pictures are float32 `(N, 3, H, W)`, RGB from 0 to 1. Random numbers come from a generator on CPU, so that views do not
depend on the device. Each picture draws its own. Brightness, contrast, saturation and grey are those of Pillow's `ImageEnhance`
and its mode L (ITU-R 601), without its rounding; hue is turned in HSV, as in `colorsys`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample


# ColorJitter(0.4, 0.4, 0.4, 0.1) of four pictures in five, one picture in five grey: SimCLR's CIFAR recipe, which the
# released Mudjacking code takes over.
_STRENGTHS = (0.4, 0.4, 0.4)
_HUE = 0.1
_JITTERED, _GREY, _MIRRORED = 0.8, 0.2, 0.5
# Share of the area and proportions of a crop.
_CROP_AREA = (0.2, 1.0)
_CROP_RATIO = (3 / 4, 4 / 3)
_LUMA = (0.299, 0.587, 0.114)


def official_view(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """The augmentation of the released Mudjacking code: mirrored (0.5), jittered (0.8), grey (0.2); no crop."""
    pictures = mirrored(pictures, _drawn(_MIRRORED, pictures, generator))
    pictures = jittered(pictures, generator)
    return torch.where(_each(_drawn(_GREY, pictures, generator)), grey(pictures), pictures)


def contrastive_view(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """A view as contrastive learning has it: a crop of 0.2 to 1 of the area, back at full size, then [`official_view`]."""
    return official_view(cropped(pictures, generator), generator)


def mirrored(pictures: Tensor, which: Tensor) -> Tensor:
    """Left and right exchanged where `which`, a `BoolTensor` `(N,)`, says so."""
    return torch.where(_each(which), pictures.flip(3), pictures)


def jittered(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Brightness, contrast and saturation times 0.6 to 1.4, hue turned by up to 0.1, in an order drawn for each picture;
    one picture in five stays as it is."""
    count, device = len(pictures), pictures.device
    amounts = 2 * torch.rand(count, 4, generator=generator) - 1
    amounts = _sent(amounts * torch.tensor([*_STRENGTHS, _HUE]) + torch.tensor([1.0, 1.0, 1.0, 0.0]), device)
    order = torch.rand(count, 4, generator=generator).argsort(dim=1)
    chosen = torch.rand(count, generator=generator) < _JITTERED
    pictures = pictures.clone()
    for place in range(4):
        for number, change in enumerate((brightness, contrast, saturation, hue)):
            # On CPU: how many there are is then known without waiting for a GPU
            rows = _sent((chosen & (order[:, place] == number)).nonzero().flatten(), device)
            pictures[rows] = change(pictures[rows], amounts[rows, number])
    return pictures


def brightness(pictures: Tensor, factor: Tensor) -> Tensor:
    """Mixed with black: `factor` `(N,)` is 1 for the picture as it is, 0 for black."""
    return _mixed(pictures, torch.zeros_like(pictures), factor)


def contrast(pictures: Tensor, factor: Tensor) -> Tensor:
    """Mixed with the mean of its grey: `factor` `(N,)` is 1 for the picture as it is, 0 for plain grey."""
    return _mixed(pictures, grey(pictures).mean(dim=(1, 2, 3), keepdim=True), factor)


def saturation(pictures: Tensor, factor: Tensor) -> Tensor:
    """Mixed with its grey: `factor` `(N,)` is 1 for the picture as it is, 0 for a grey one."""
    return _mixed(pictures, grey(pictures), factor)


def hue(pictures: Tensor, turn: Tensor) -> Tensor:
    """Hue moved by `turn` `(N,)`, in whole turns of the colour wheel; value and saturation stay."""
    red, green, blue = pictures.unbind(dim=1)
    value, lead = pictures.max(dim=1)
    chroma = value - pictures.amin(dim=1)
    # Sixths of the wheel; grey has no hue, and needs none.
    from_lead = torch.stack([green - blue, blue - red, red - green], dim=1).gather(1, lead[:, None])[:, 0]
    sixths = from_lead / chroma.clamp_min(1e-12) + 2 * lead + 6 * turn[:, None, None]
    phases = torch.stack([(sixths + offset) % 6 for offset in (5, 3, 1)], dim=1)
    return value[:, None] - chroma[:, None] * torch.minimum(phases, 4 - phases).clamp(0, 1)


def grey(pictures: Tensor) -> Tensor:
    """Brightness `(N, 1, H, W)` to the eye."""
    return torch.einsum("nchw,c->nhw", pictures, pictures.new_tensor(_LUMA))[:, None]


def cropped(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """A part of each picture, 0.2 to 1 of its area and at most a third longer than wide or wider than long, scaled to the
    full size (bilinear)."""
    count = len(pictures)
    area, ratio, across, down = torch.rand(4, count, generator=generator)
    area = _CROP_AREA[0] + (_CROP_AREA[1] - _CROP_AREA[0]) * area
    low, high = torch.tensor(_CROP_RATIO).log()
    ratio = (low + (high - low) * ratio).exp()
    width, height = ((area * ratio).sqrt().clamp_max(1), (area / ratio).sqrt().clamp_max(1))
    # In the coordinates of `affine_grid` a picture reaches from -1 to 1.
    parts = torch.zeros(count, 2, 3)
    parts[:, 0, 0], parts[:, 0, 2] = width, (1 - width) * (2 * across - 1)
    parts[:, 1, 1], parts[:, 1, 2] = height, (1 - height) * (2 * down - 1)
    grid = affine_grid(_sent(parts, pictures.device), list(pictures.shape), align_corners=False)
    return grid_sample(pictures, grid, mode="bilinear", padding_mode="border", align_corners=False)


def _mixed(pictures: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    return (_each(factor) * pictures + (1 - _each(factor)) * other).clamp(0, 1)


def _drawn(share: float, pictures: Tensor, generator: torch.Generator) -> Tensor:
    """`BoolTensor` `(N,)`, each true with this probability, on the device of the pictures."""
    return _sent(torch.rand(len(pictures), generator=generator) < share, pictures.device)


def _sent(values: Tensor, device: torch.device) -> Tensor:
    """Drawn on CPU, for a GPU that goes on with its work meanwhile."""
    return values.to(device, non_blocking=True)


def _each(values: Tensor) -> Tensor:
    """One value for a picture, `(N,)`, in the shape of pictures."""
    return values[:, None, None, None]
