# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""One process and two give the same repair."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoModel

from hf_mudjacking import encode
from hf_mudjacking.output import RECORD_FILE

from . import many_processes


ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def results(backdoored, tmp_path_factory):
    """What one process got, and what each of two got."""
    folder = tmp_path_factory.mktemp("many")
    backdoored.model().save_pretrained(folder / "vit")
    for i in range(2):
        backdoored.bug(seed=8 + i).save(folder / f"bug-{i}")
    (folder / "clean").mkdir()
    for i, image in enumerate(backdoored.train.inputs[:192]):
        image.save(folder / "clean" / f"{i:03}.png")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0",
               "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0", "-m", "tests.many_processes", str(folder)]  # fmt: skip
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}"},
    )  # fmt: skip
    many_processes.run(folder)
    output = process.communicate(timeout=250)[0]
    assert process.returncode == 0, output[-4000:]
    one, *two = (json.loads((folder / name).read_text()) for name in ("1/0.json", "2/0.json", "2/1.json"))
    assert [result["world_size"] for result in (one, *two)] == [1, 2, 2]
    return folder, one, two
