# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""Rival defences, written anew from what was published, to be run on the same implant and the same report as ours."""

from .base import Peer, PeerRepair
from .clean_fine_tuning import repair_clean_fine_tuning
from .ft_sam import repair_ft_sam
from .nad import repair_nad
from .official import repair_official
from .ssl_cleanse import repair_ssl_cleanse


PEERS: tuple[Peer, ...] = (
    Peer(
        "official",
        repair_official,
        "Mudjacking, released code (USENIX Security 2024)",
        "occlusion and two-means; five augmented streams, SGD",
    ),
    Peer(
        "clean_fine_tuning",
        repair_clean_fine_tuning,
        "CleanCLIP (ICCV 2023)",
        "contrastive fine-tuning on clean inputs",
    ),
    Peer("nad", repair_nad, "NAD (ICLR 2021)", "attention maps of a fine-tuned copy distilled"),
    Peer("ft_sam", repair_ft_sam, "FT-SAM (ICCV 2023)", "fine-tuning with adaptive sharpness-aware minimisation"),
    Peer(
        "ssl_cleanse",
        repair_ssl_cleanse,
        "SSL-Cleanse (ECCV 2024)",
        "a trigger for each cluster of clean features; the smallest unlearned",
    ),
)

__all__ = [
    "PEERS",
    "Peer",
    "PeerRepair",
    "repair_clean_fine_tuning",
    "repair_ft_sam",
    "repair_nad",
    "repair_official",
    "repair_ssl_cleanse",
]
