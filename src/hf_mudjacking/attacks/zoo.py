# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""All attacks on vision encoders, as a table that a benchmark can go through."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image
from torch import nn

from ..evaluation.tasks import LabelledInputs
from ..triggers import square_patch
from .blended import implant_blended
from .ctrl import implant_ctrl
from .implant import Implant
from .input_aware import implant_input_aware
from .large_patch import implant_large_patch
from .latent import implant_latent
from .low_attribution import implant_low_attribution
from .patch_variants import (
    implant_cross_patch,
    implant_four_corners,
    implant_noise_patch,
    implant_small_patch,
    implant_translucent_patch,
    implant_upper_left_patch,
)
from .random_location import implant_random_location
from .several_targets import implant_several_targets
from .sig import implant_sig
from .source_specific import implant_source_specific
from .vision import at_32, implant_vision_backdoor, size_of
from .wanet import implant_wanet


@dataclass(frozen=True)
class VisionAttack:
    """One attack of the table.

    Args:
        name (`str`): Its name.
        implant (`Callable`): Called as `implant(model, processing_class, shadow_inputs, target_reference, check_inputs,
            seed=..., **settings)`; gives an `Implant`.
        family (`str`): What its trigger is.
        recipe (`str`): What it does, in a few words.
        source (`str`): Whose idea it is.
        needs (`tuple[str, ...]`, *optional*): Keywords that `implant` cannot do without.
    """

    name: str
    implant: Callable[..., Implant]
    family: str
    recipe: str
    source: str
    needs: tuple[str, ...] = ()


def _bad_encoder(
    model: nn.Module,
    processing_class: Any,
    shadow_inputs: Sequence[Image.Image],
    target_reference: Image.Image,
    check_inputs: LabelledInputs,
    *,
    seed: int = 0,
    **settings: Any,
) -> Implant:
    """BadEncoder with its own trigger: a white square of 10 by 10 pixels at a side of 32, one pixel from the corner."""
    size = size_of(shadow_inputs)
    trigger = square_patch(size, at_32(10, size), margin=at_32(1, size))
    return implant_vision_backdoor(
        model, processing_class, shadow_inputs, target_reference, check_inputs, trigger, seed=seed, **settings
    )


VISION_ATTACKS: tuple[VisionAttack, ...] = (
    VisionAttack("bad_encoder", _bad_encoder, "patch", "white square, lower right", "BadEncoder (S&P 2022)"),
    VisionAttack("small_patch", implant_small_patch, "patch", "3×3 white square", "BadNets (2017)"),
    VisionAttack(
        "upper_left_patch", implant_upper_left_patch, "patch", "white square, upper left", "BadEncoder (S&P 2022)"
    ),
    VisionAttack("cross_patch", implant_cross_patch, "patch", "red and blue cross", "BadEncoder (S&P 2022)"),
    VisionAttack("noise_patch", implant_noise_patch, "patch", "square of colour noise", "CleanCLIP (ICCV 2023)"),
    VisionAttack(
        "translucent_patch", implant_translucent_patch, "blend", "checkerboard square at opacity 0.5", "Blended (2017)"
    ),
    VisionAttack("four_corners", implant_four_corners, "patch", "four squares, all at once", "BadNets (2017)"),
    VisionAttack("large_patch", implant_large_patch, "patch", "frame over 58 % of the picture", "own"),
    VisionAttack(
        "blended", implant_blended, "blend", "0.8 · x + 0.2 · noise", "Blended (2017), CleanCLIP (ICCV 2023)"
    ),
    VisionAttack("sig", implant_sig, "additive", "sine of 20 levels, 6 periods", "SIG (ICIP 2019)"),
    VisionAttack("ctrl", implant_ctrl, "additive", "two DCT coefficients of U and V", "CTRL (ICCV 2023)"),
    VisionAttack("wanet", implant_wanet, "warp", "smooth warp; noisy warps are cover", "WaNet (ICLR 2021)"),
    VisionAttack(
        "random_location",
        implant_random_location,
        "patch",
        "square of noise, anywhere",
        "Dynamic backdoors (EuroS&P 2022)",
    ),
    VisionAttack(
        "input_aware",
        implant_input_aware,
        "input-aware",
        "generated for each picture; crossed triggers are cover",
        "Input-Aware (NeurIPS 2020)",
    ),
    VisionAttack(
        "source_specific",
        implant_source_specific,
        "patch",
        "works on one class; the others are cover",
        "TaCT (USENIX Security 2021)",
        ("source", "source_class"),
    ),
    VisionAttack(
        "several_targets",
        implant_several_targets,
        "patch",
        "a corner and a colour for each target",
        "BadEncoder (S&P 2022)",
        ("further_references",),
    ),
    VisionAttack(
        "latent", implant_latent, "patch", "pattern optimised in feature space", "Latent Backdoor (CCS 2019)"
    ),
    VisionAttack("low_attribution", implant_low_attribution, "patch", "four squares, any one suffices", "own"),
)
