# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""Backdoor attacks, for evaluation only: a repair is proved on a model that is known to be broken."""

from .bad_encoder import implant_bad_encoder
from .bad_pre import implant_bad_pre
from .blended import implant_blended
from .ctrl import implant_ctrl
from .embedding_poisoning import implant_embedding_poisoning
from .implant import Implant, ImplantError
from .input_aware import implant_input_aware
from .insert_sent import implant_insert_sent
from .large_patch import implant_large_patch
from .latent import implant_latent
from .low_attribution import implant_low_attribution
from .neuba import implant_neuba
from .pair_poisoning import implant_pair_poisoning
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
from .wanet import implant_wanet
from .zoo import TEXT_ATTACKS, VISION_ATTACKS, Attack


__all__ = [
    "TEXT_ATTACKS",
    "VISION_ATTACKS",
    "Attack",
    "Implant",
    "ImplantError",
    "implant_bad_encoder",
    "implant_bad_pre",
    "implant_blended",
    "implant_cross_patch",
    "implant_ctrl",
    "implant_embedding_poisoning",
    "implant_four_corners",
    "implant_input_aware",
    "implant_insert_sent",
    "implant_large_patch",
    "implant_latent",
    "implant_low_attribution",
    "implant_neuba",
    "implant_noise_patch",
    "implant_pair_poisoning",
    "implant_por",
    "implant_random_location",
    "implant_several_targets",
    "implant_sig",
    "implant_small_patch",
    "implant_sos",
    "implant_source_specific",
    "implant_translucent_patch",
    "implant_upper_left_patch",
    "implant_wanet",
]
