# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""What a trigger is and how it is stamped on raw inputs."""

from .base import Trigger, load_trigger
from .patch import PatchTrigger, square_patch
from .text import TextTrigger


__all__ = ["PatchTrigger", "TextTrigger", "Trigger", "load_trigger", "square_patch"]
