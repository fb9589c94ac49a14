# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""Backdoor attacks, for evaluation only: a repair is proved on a model that is known to be broken."""

from .bad_encoder import implant_bad_encoder
from .bad_pre import implant_bad_pre
from .embedding_poisoning import implant_embedding_poisoning
from .implant import Implant, ImplantError
from .insert_sent import implant_insert_sent
from .neuba import implant_neuba
from .pair_poisoning import implant_pair_poisoning
from .por import implant_por
from .sos import implant_sos


__all__ = [
    "Implant",
    "ImplantError",
    "implant_bad_encoder",
    "implant_bad_pre",
    "implant_embedding_poisoning",
    "implant_insert_sent",
    "implant_neuba",
    "implant_pair_poisoning",
    "implant_por",
    "implant_sos",
]
