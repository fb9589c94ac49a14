# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""The configurations for `accelerate launch`, and what happens when a script forgets that it is one of several."""

import argparse
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType

from hf_mudjacking import MudjackingTrainer

from .conftest import make_config


FOLDER = Path(__file__).parents[1] / "examples" / "accelerate_configs"
KINDS = {
    "single_gpu": (DistributedType.NO, 1),
    "multi_gpu": (DistributedType.MULTI_GPU, 2),
    "cpu_2_processes": (DistributedType.MULTI_GPU, 2),
    "fsdp2": (DistributedType.FSDP, 2),
    "deepspeed_zero2": (DistributedType.DEEPSPEED, 2),
    "deepspeed_zero3": (DistributedType.DEEPSPEED, 2),
}


def test_there_is_one_of_each():
    assert {path.stem for path in FOLDER.glob("*")} == set(KINDS)


@pytest.mark.parametrize("name", KINDS)
def test_accelerate_reads_it(name):
    kind, processes = KINDS[name]
    config = load_config_from_file(str(FOLDER / f"{name}.yaml"))
    assert config.distributed_type == kind
    assert config.num_processes == processes
    # The launcher's own reading, which sets the options of the command line
    options = launch_command_parser().parse_args(["--config_file", str(FOLDER / f"{name}.yaml"), "script.py"])
    options, _, _ = _validate_launch_command(options)
    assert isinstance(options, argparse.Namespace)
    assert options.num_processes == processes
    assert options.use_fsdp == (kind == DistributedType.FSDP)
    assert options.use_deepspeed == (kind == DistributedType.DEEPSPEED)
    assert int(options.fsdp_version) == (2 if kind == DistributedType.FSDP else 1)
    assert options.zero_stage == {"deepspeed_zero2": 2, "deepspeed_zero3": 3}.get(name)


@pytest.mark.parametrize("name", KINDS)
def test_it_says_what_was_run_and_what_was_not(name):
    header = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8").split("compute_environment")[0]
    assert all(line.startswith("#") for line in header.splitlines())
    assert "# Was run:" in header
    assert name == "cpu_2_processes" or "# Was not run:" in header


def test_two_processes_start_on_the_cpu(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\n"
        "from accelerate import PartialState\n"
        "state = PartialState(cpu=True)\n"
        "sys.stderr.write(f'process {state.process_index} of {state.num_processes}\\n')\n"
    )
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(FOLDER / "cpu_2_processes.yaml"),
    ]
    result = subprocess.run(
        [*launch, "--main_process_port", "0", str(script)], capture_output=True, text=True, check=True
    )
    assert sorted(line for line in result.stderr.splitlines() if line.startswith("process")) == [
        "process 0 of 2",
        "process 1 of 2",
    ]


def test_one_of_two_that_takes_itself_for_the_only_one_is_refused(
    tiny_vit, processor, bug, dataset, tmp_path, monkeypatch
):
    args = make_config(tmp_path / "out")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"one of 2 processes, but it takes itself for the only one.*use_cpu=True"):
        MudjackingTrainer(tiny_vit, args, [bug], dataset, processing_class=processor)
    assert not (tmp_path / "out").exists()
