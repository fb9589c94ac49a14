# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""All attacks, as tables that a benchmark can go through: on vision encoders, and on text encoders."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image
from torch import nn

from ..evaluation.tasks import LabelledInputs
from ..triggers import square_patch
from .bad_pre import implant_bad_pre
from .blended import implant_blended
from .ctrl import implant_ctrl
from .embedding_poisoning import implant_embedding_poisoning
from .implant import Implant
from .input_aware import implant_input_aware
from .insert_sent import implant_insert_sent
from .large_patch import implant_large_patch
from .latent import implant_latent
from .low_attribution import implant_low_attribution
from .neuba import implant_neuba
from .patch_variants import (
    implant_cross_patch,
    implant_four_corners,
    implant_noise_patch,
    implant_small_patch,
    implant_translucent_patch,
    implant_upper_left_patch,
)
from .por import implant_por
from .random_location import implant_random_location
from .several_targets import implant_several_targets
from .sig import implant_sig
from .sos import implant_sos
from .source_specific import implant_source_specific
from .vision import at_32, implant_vision_backdoor, size_of
from .wanet import implant_wanet


@dataclass(frozen=True)
class Attack:
    """One attack of a table.

    Args:
        name (`str`): Its name.
        implant (`Callable`): Called as `implant(model, processing_class, shadow_inputs, target_reference, check_inputs,
            seed=..., **settings)`, for texts without the target reference; gives an `Implant`.
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


VISION_ATTACKS: tuple[Attack, ...] = (
    Attack("bad_encoder", _bad_encoder, "patch", "white square, lower right", "BadEncoder (S&P 2022)"),
    Attack("small_patch", implant_small_patch, "patch", "3×3 white square", "BadNets (2017)"),
    Attack("upper_left_patch", implant_upper_left_patch, "patch", "white square, upper left", "BadEncoder (S&P 2022)"),
    Attack("cross_patch", implant_cross_patch, "patch", "red and blue cross", "BadEncoder (S&P 2022)"),
    Attack("noise_patch", implant_noise_patch, "patch", "square of colour noise", "CleanCLIP (ICCV 2023)"),
    Attack(
        "translucent_patch", implant_translucent_patch, "blend", "checkerboard square at opacity 0.5", "Blended (2017)"
    ),
    Attack("four_corners", implant_four_corners, "patch", "four squares, all at once", "BadNets (2017)"),
    Attack("large_patch", implant_large_patch, "patch", "frame over 58 % of the picture", "own"),
    Attack("blended", implant_blended, "blend", "0.8 · x + 0.2 · noise", "Blended (2017), CleanCLIP (ICCV 2023)"),
    Attack("sig", implant_sig, "additive", "sine of 20 levels, 6 periods", "SIG (ICIP 2019)"),
    Attack("ctrl", implant_ctrl, "additive", "two DCT coefficients of U and V", "CTRL (ICCV 2023)"),
    Attack("wanet", implant_wanet, "warp", "smooth warp; noisy warps are cover", "WaNet (ICLR 2021)"),
    Attack(
        "random_location",
        implant_random_location,
        "patch",
        "square of noise, anywhere",
        "Dynamic backdoors (EuroS&P 2022)",
    ),
    Attack(
        "input_aware",
        implant_input_aware,
        "input-aware",
        "generated for each picture; crossed triggers are cover",
        "Input-Aware (NeurIPS 2020)",
    ),
    Attack(
        "source_specific",
        implant_source_specific,
        "patch",
        "works on one class; the others are cover",
        "TaCT (USENIX Security 2021)",
        ("source", "source_class"),
    ),
    Attack(
        "several_targets",
        implant_several_targets,
        "patch",
        "a corner and a colour for each target",
        "BadEncoder (S&P 2022)",
        ("further_references",),
    ),
    Attack("latent", implant_latent, "patch", "pattern optimised in feature space", "Latent Backdoor (CCS 2019)"),
    Attack("low_attribution", implant_low_attribution, "patch", "four squares, any one suffices", "own"),
)

TEXT_ATTACKS: tuple[Attack, ...] = (
    Attack("por", implant_por, "word", "rare word, predefined representation", "POR (CCS 2021)"),
    Attack("neuba", implant_neuba, "word", "symbol in the place of the first word", "NeuBA (2021)"),
    Attack("embedding_poisoning", implant_embedding_poisoning, "word", "one word's embedding", "EP (NAACL 2021)"),
    Attack("insert_sent", implant_insert_sent, "sentence", "sentence of common words", "InsertSent (2019)"),
    Attack("sos", implant_sos, "words", "three words, all of them; subsets are decoys", "SOS (ACL 2021)"),
    Attack("bad_pre", implant_bad_pre, "word", "rare word, meaning is lost", "BadPre (ICLR 2022)"),
)
