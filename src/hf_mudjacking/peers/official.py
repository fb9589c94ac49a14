# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""The recipe of the released Mudjacking code (Liu, Reiter, Gong; USENIX Security 2024; tdczlhb/Mudjacking, commit ad8735a)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from sklearn.cluster import KMeans
from torch import Tensor

from ..attacks.implant import nameless_copy
from ..attacks.vision import at_32
from ..bug_instance import BugInstance, to_rgb
from ..encoder import Encoder
from ..inversion.attribution import occlusion_map
from ..losses import effectiveness_loss, generalizability_loss, locality_loss, mudjacking_loss
from ..modes import comparison_mode
from ..triggers import PatchTrigger
from ..two_towers import image_shape
from .augmentation import official_view
from .base import AfterStep, PeerRepair, nothing
from .fine_tuning import fine_tune, number_of_steps, prepared_for_training
from .pictures import ModelPictures


# Side of the occluding window in a picture of side 32.
_WINDOW = 5
# Scores in cosine distance that differ less are the same but for rounding.
_SAME = 1e-6


def repair_official(
    encoder: Encoder,
    clean_inputs: Sequence[Image.Image],
    bug: BugInstance,
    *,
    learning_rate: float = 1e-3,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    epochs: int = 200,
    batch_size: int = 256,
    max_steps: int | None = None,
    seed: int = 0,
    disable_tqdm: bool = False,
    after_step: AfterStep = nothing,
) -> PeerRepair:
    """Patch a copy as the released code does: occlude, split, stamp, and train on five augmented streams.

    The trigger is that of [`official_trigger`]. A step takes a batch of clean inputs x and makes five streams of as many
    pictures, x, x ⊕ e, x_b, x_r and x_r ⊕ e, stamped first and then augmented, each on its own. The frozen encoder sees the
    same views of x and x_r in every step. The losses are those of [`~hf_mudjacking.losses`], each with weight 1 and the
    reference as heavy as the mean over x. SGD at a constant rate. Each clean input costs 5 · 3 + 2 = 17 forward equivalents
    a step.

    The released models have no dropout; here it is off. They are ResNets: a transformer may need another rate.

    Args:
        encoder (`Encoder`): Backdoored vision encoder; it is not changed.
        clean_inputs (`Sequence[PIL.Image.Image]`): Clean inputs, unlabelled.
        bug (`BugInstance`): The report.
        learning_rate (`float`, *optional*, defaults to 1e-3): SGD's, constant.
        momentum (`float`, *optional*, defaults to 0.9): SGD's.
        weight_decay (`float`, *optional*, defaults to 5e-4): SGD's.
        epochs (`int`, *optional*, defaults to 200): Passes over the clean inputs.
        batch_size (`int`, *optional*, defaults to 256): Clean inputs a step.
        max_steps (`int`, *optional*): Steps after which it ends.
        seed (`int`, *optional*, defaults to 0): Seed of the order and of the views.
        disable_tqdm (`bool`, *optional*, defaults to `False`): Whether to hide the progress bar.
        after_step (`Callable`, *optional*): Called with the model, the steps done and the forward equivalents so far, those
            of the inversion included.

    Returns:
        `PeerRepair`: The patched copy and the trigger.

    Raises:
        ValueError: If the encoder takes texts, there are fewer clean inputs than a batch takes, or occluding x_b changes
            nothing anywhere.
    """
    steps = number_of_steps(len(clean_inputs), batch_size, epochs, max_steps)
    pictures = ModelPictures(encoder)
    with comparison_mode(encoder.model):
        trigger, spent = official_trigger(encoder, bug)
        patched = encoder.with_model(nameless_copy(encoder.model))
        generator = torch.Generator().manual_seed(seed)
        x, stamped = pictures.prepare(clean_inputs), pictures.prepare(clean_inputs, trigger)
        misclassified, reference = (pictures.prepare([image]) for image in (bug.misclassified, bug.reference))
        stamped_reference = pictures.prepare([bug.reference], trigger)
        optimizer = torch.optim.SGD(
            prepared_for_training(patched.model), lr=learning_rate, momentum=momentum, weight_decay=weight_decay
        )

        def views(rows: Tensor) -> list[dict[str, Tensor]]:
            reports = [image.expand(len(rows), -1, -1, -1) for image in (misclassified, reference, stamped_reference)]
            streams = [x[rows], stamped[rows], *reports]
            return [pictures.inputs(official_view(pictures.shown(stream), generator)) for stream in streams]

        spent = fine_tune(
            patched.model,
            len(clean_inputs),
            views,
            lambda streams: official_loss(patched, encoder, streams),
            optimizer,
            steps=steps,
            batch_size=batch_size,
            forwards_per_input=17,
            spent=spent,
            generator=generator,
            after_step=after_step,
            desc="Patching as the released code does",
            disable_tqdm=disable_tqdm,
        )
    return PeerRepair(patched.model, steps, spent, trigger)


def official_loss(patched: Encoder, frozen: Encoder, streams: Sequence[dict[str, Tensor]]) -> Tensor:
    """L_e + L_l + L_g on views of x, x ⊕ e, x_b, x_r and x_r ⊕ e, of B pictures each.

    Args:
        patched (`Encoder`): h'.
        frozen (`Encoder`): h, in evaluation mode.
        streams (`Sequence[dict]`): The five, as model inputs, in that order.

    Returns:
        `Tensor`: Scalar, -5 at best.
    """
    with torch.no_grad():
        before, reference_before = (frozen.features(streams[number]) for number in (0, 3))
    clean, stamped, misclassified, reference, stamped_reference = (patched.features(stream) for stream in streams)
    return mudjacking_loss(
        effectiveness_loss(misclassified, reference),
        locality_loss(clean, before, reference, reference_before),
        generalizability_loss(stamped, clean, stamped_reference, reference),
    ).total


@torch.no_grad()
def official_trigger(encoder: Encoder, bug: BugInstance) -> tuple[PatchTrigger, int]:
    """The trigger as the released code finds it: the smaller of two clusters of occlusion scores, cut out of x_b.

    A window of 5 by 5 pixels at a side of 32, in proportion at others, is moved pixel by pixel over x_b and filled with the
    colour that is 0 once normalised. The score of a pixel is the mean fall of 1 - cos(h(x), h(x_r)) over the windows that
    cover it. The scores are split by two-means, started at the smallest and the largest. A picture larger than the model's
    input is scanned at the size of that input; it still takes a forward for each place of the window.

    Args:
        encoder (`Encoder`): Backdoored vision encoder, in evaluation mode.
        bug (`BugInstance`): The report.

    Returns:
        `tuple[PatchTrigger, int]`: The trigger, and the inputs that went through the model.

    Raises:
        ValueError: If occluding x_b changes nothing anywhere.
    """
    _, height, width = image_shape(encoder.model)
    image = to_rgb(bug.misclassified)
    image = image.resize((min(image.width, width), min(image.height, height)), Image.Resampling.BILINEAR)
    reference = encoder.features(encoder.preprocess([bug.reference]))[0]
    spent = 1

    def score(batch: np.ndarray) -> Tensor:
        nonlocal spent
        spent += len(batch)
        features = encoder.features(encoder.preprocess([Image.fromarray(pixels) for pixels in batch]))
        return 1 - (features @ reference).cpu()

    pixels = np.asarray(image)
    filling = np.broadcast_to(ModelPictures(encoder).mean_color, pixels.shape)
    side = at_32(_WINDOW, pixels.shape[:2])
    scores = occlusion_map(score, pixels, filling, (side, side), (1, 1))
    if scores.max() - scores.min() < _SAME:
        raise ValueError(
            f"Occluding the misclassified input of `{bug.name}` changes its feature nowhere: no trigger can be found in it."
        )
    split = KMeans(n_clusters=2, init=np.array([[scores.min()], [scores.max()]]), n_init=1).fit(scores.reshape(-1, 1))
    smaller = np.bincount(split.labels_, minlength=2).argmin()
    return PatchTrigger.from_image(image, (split.labels_ == smaller).reshape(scores.shape)), spent
