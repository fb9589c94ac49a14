# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""Pictures of the size that a model sees, before they are normalised: what can be augmented in batches."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..encoder import Encoder
from ..triggers import Trigger
from ..two_towers import image_shape


# Pictures that go through the image processor at once.
_GROUP = 512


class ModelPictures:
    """The way from raw pictures to model inputs, with a halt before the normalisation.

    A processor's normalisation is an affine change of colours. It is read off by showing the processor black, red, green and
    blue, so that any processor will do, those that exchange channels or make pictures grey too.

    Args:
        encoder (`Encoder`): Vision encoder.

    Raises:
        ValueError: If the encoder takes texts, or its processor tells no colours apart.
    """

    def __init__(self, encoder: Encoder) -> None:
        if encoder.modality != "image":
            raise ValueError(
                f"`{type(encoder.model).__name__}` takes texts, and this defence is for vision encoders. Pass an encoder of "
                "images."
            )
        self.encoder = encoder
        _, height, width = image_shape(encoder.model)
        plain = [np.broadcast_to(255 * color, (height, width, 3)).astype(np.uint8) for color in np.eye(4, 3, k=-1)]
        shown = encoder.preprocess([Image.fromarray(pixels) for pixels in plain])["pixel_values"].float()
        # At the centre, since some processors pad.
        black, *colors = shown[:, :, shown.shape[2] // 2, shown.shape[3] // 2]
        self.offset = black
        self.mixing = torch.stack(colors, dim=1) - black[:, None]
        if len(black) == 1:
            self.inverse = torch.ones(3, 1) / self.mixing.sum()
        else:
            self.inverse = torch.linalg.pinv(self.mixing)
        if not torch.isfinite(self.inverse).all() or self.inverse.abs().max() == 0:
            raise ValueError(
                f"`{type(encoder.processing_class).__name__}` gives the same for every colour. Pass the image processor that "
                "belongs to the model."
            )

    @property
    def mean_color(self) -> np.ndarray:
        """The raw colour, `uint8` `(3,)`, that is 0 once normalised."""
        return (255 * (self.inverse @ -self.offset)).round().clamp(0, 255).byte().numpy()

    def prepare(self, images: Sequence[Image.Image], trigger: Trigger | None = None) -> Tensor:
        """Resized and cropped, not normalised: `ByteTensor` `(N, 3, H, W)`, RGB, on CPU; 3 · H · W bytes a picture.

        Args:
            images (`Sequence[PIL.Image.Image]`): N raw pictures of any size.
            trigger (`Trigger`, *optional*): Stamped on each raw picture first.
        """
        groups = []
        for start in range(0, len(images), _GROUP):
            group = images[start : start + _GROUP]
            if trigger is not None:
                group = [self.encoder.stamp(trigger, image) for image in group]
            normalized = self.encoder.preprocess(group)["pixel_values"].float()
            colors = torch.einsum("nchw,kc->nkhw", normalized - self.offset[:, None, None], self.inverse)
            groups.append((255 * colors).round().clamp(0, 255).byte())
        return torch.cat(groups)

    def shown(self, prepared: Tensor) -> Tensor:
        """Prepared pictures on the model's device, float32, 0 to 1."""
        return prepared.to(self.encoder.device).float() / 255

    def inputs(self, pictures: Tensor) -> dict[str, Tensor]:
        """Model inputs of pictures `(N, 3, H, W)`, 0 to 1."""
        mixing, offset = self.mixing.to(pictures.device), self.offset.to(pictures.device)
        return {"pixel_values": torch.einsum("nkhw,ck->nchw", pictures, mixing) + offset[:, None, None]}
