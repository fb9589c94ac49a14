# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""Backdoor attacks, for evaluation only: a repair is proved on a model that is known to be broken."""

from .bad_encoder import implant_bad_encoder
from .implant import Implant, ImplantError


__all__ = ["Implant", "ImplantError", "implant_bad_encoder"]
