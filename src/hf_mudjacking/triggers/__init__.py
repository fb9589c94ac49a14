# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""What a trigger is and how it is stamped on raw inputs."""

from .additive import AdditiveTrigger
from .base import ImageTrigger, Trigger, load_trigger, with_altered
from .blend import BlendTrigger, noise_blend
from .patch import PatchTrigger, square_patch
from .text import TextTrigger
from .warp import WarpTrigger, random_warp


__all__ = [
    "AdditiveTrigger",
    "BlendTrigger",
    "ImageTrigger",
    "PatchTrigger",
    "TextTrigger",
    "Trigger",
    "WarpTrigger",
    "load_trigger",
    "noise_blend",
    "random_warp",
    "square_patch",
    "with_altered",
]
