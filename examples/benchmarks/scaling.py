# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""Time and memory of storing the frozen model's features, as the number of clean inputs grows.

    python examples/benchmarks/scaling.py --output docs/results/scaling.json

A ViT of 2 layers and width 768 reads pictures of 32×32 pixels from an Arrow file. For each number of inputs its features are
stored by one process in its own memory, by one process in a mapped file, and by two processes in one mapped file. Memory
is what each process has grown by when the features are there: `anonymous` is its own alone, `file` are pages of mapped files,
the inputs' among them, which processes share and the system may drop. About two minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from torch import distributed as dist
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from transformers import ViTConfig, ViTModel
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from hf_mudjacking import Encoder
from hf_mudjacking.clean_inputs import CleanImages
from hf_mudjacking.feature_store import stored_features


WIDTH, SIDE = 768, 32


def memory() -> dict[str, float]:
    """Resident memory of this process in MiB, by kind, and its peak."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    parts = {name: int(re.search(rf"{key}:\s+(\d+) kB", status).group(1)) / 1024
             for name, key in (("anonymous", "RssAnon"), ("file", "RssFile"))}  # fmt: skip
    return {**parts, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def make_inputs(folder: str, count: int) -> None:
    """Pictures of noise in an Arrow file."""
    rng = np.random.default_rng(0)
    pictures = datasets.Dataset.from_generator(
        lambda: (
            {"image": Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8))} for _ in range(count)
        ),
        features=datasets.Features({"image": datasets.Image()}),
        cache_dir=f"{folder}/cache",
    )
    pictures.save_to_disk(f"{folder}/pictures")


def measure(folder: str, count: int, processes: int, in_memory: int) -> dict[str, Any]:
    """Store the features of `count` inputs in this process, together with the others."""
    torch.set_num_threads(1)
    if processes > 1:
        dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = ViTModel(
        ViTConfig(
            hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=12, intermediate_size=WIDTH, image_size=SIDE,
            patch_size=16,
        ),
        add_pooling_layer=False,
    )  # fmt: skip
    encoder = Encoder(model, ViTImageProcessorPil(do_resize=False))
    inputs = CleanImages(datasets.load_from_disk(f"{folder}/pictures").select(range(count)))
    encoder.encode(inputs.sample(64, 0))
    before, started = memory(), time.perf_counter()
    features = stored_features(encoder, inputs, 64, True, "", in_memory=in_memory)
    seconds, after = time.perf_counter() - started, memory()
    assert features.shape == (count, WIDTH)
    return {"seconds": round(seconds, 2), **{f"{k}_mib": round(after[k] - before[k], 1) for k in after}}


def run(folder: str, count: int, processes: int, in_memory: int) -> list[dict[str, Any]]:
    """What each process measured."""
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=processes, run_id="scaling", max_restarts=0, monitor_interval=0.1,
        start_method="fork", rdzv_backend="c10d", rdzv_endpoint="localhost:0",
    )  # fmt: skip
    results = elastic_launch(config, measure)(folder, count, processes, in_memory)
    return [results[rank] for rank in range(processes)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, nargs="+", default=[1000, 4000, 16000], help="numbers of clean inputs")
    parser.add_argument("--output", help="json file of results")
    options = parser.parse_args()
    cells = []
    with tempfile.TemporaryDirectory() as folder:
        # In a process of its own: this one is forked again and again, so nothing may run in it
        process = multiprocessing.get_context("fork").Process(target=make_inputs, args=(folder, max(options.inputs)))
        process.start()
        process.join()
        for count in options.inputs:
            for where, processes, in_memory in (("memory", 1, 2**40), ("file", 1, 0), ("file", 2, 0)):
                cell = {"inputs": count, "stored_in": where, "features_mib": round(count * WIDTH * 4 / 2**20, 1),
                        "processes": run(folder, count, processes, in_memory)}  # fmt: skip
                cells.append(cell)
                sys.stderr.write(f"{json.dumps(cell)}\n")
    result = {
        "cells": cells,
        "settings": {"width": WIDTH, "layers": 2, "picture": SIDE, "threads_per_process": 1,
                     "machine": "2 cores of a shared x86-64 server, other work besides, no GPU", "torch": torch.__version__},
    }  # fmt: skip
    if options.output is not None:
        Path(options.output).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
