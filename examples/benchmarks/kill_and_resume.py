# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""Kill a repair at random points, resume it, and compare with one that was never interrupted.

    python examples/benchmarks/kill_and_resume.py --output docs/results/kill_and_resume.json
    python examples/benchmarks/kill_and_resume.py --data FOLDER --points 3        # with a model, a report and images at hand

It starts its processes itself, two a run, with the agent of torchrun, which ends the others when one dies. A point is drawn
from a seed: one of the processes, and a moment of a step, of a checkpoint being written, or of the finished patch being
written. There the process kills itself with SIGKILL; a moment of a save is one of its operations on files and folders.
Every third point kills the resumed run as well. After that the run is resumed to its end. Weights, losses of each step,
record and triggers must be those of the uninterrupted run, bit by bit, and no more steps may be repeated than lie between two
checkpoints. About five minutes on two cores; exit code 1 if any point fails.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from PIL import Image
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from transformers import AutoImageProcessor, TrainerCallback, ViTModel
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_mudjacking import BugInstance, MudjackingConfig, MudjackingTrainer
from hf_mudjacking.output import RECORD_FILE, TRIGGER_FOLDER, complete_checkpoints


STEPS, SAVE_EVERY, PROCESSES = 9, 2, 2
# Moments of a step at which a process can die, by the callback's method
MOMENTS = ("on_step_begin", "on_pre_optimizer_step", "on_step_end")
# What a save does to files and folders, as Python's audit events call it
_FILE_EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.scandir", "shutil.rmtree")


@dataclass(frozen=True)
class Kill:
    """Where a process dies: at a moment of a step, or at operation `at` on the files of save number `save`."""

    rank: int
    step: int | None = None
    moment: str | None = None
    save: int | None = None
    at: int | None = None


def mark_of(output: str | Path) -> Path:
    """A file that a process leaves when it kills itself."""
    return Path(f"{output}.died")


class Killer(TrainerCallback):
    """Counts what each save does to files, and kills this process where it shall die."""

    def __init__(self, kill: Kill | None, folder: Path) -> None:
        self.kill = kill if kill is not None and kill.rank == int(os.environ["RANK"]) else None
        self.folder = str(folder)
        # Operations of each save; the first of all belong to none
        self.operations = [0]
        self.counting = True
        sys.addaudithook(self._heard)

    def _heard(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.counting or event not in _FILE_EVENTS or not str(arguments[0]).startswith(self.folder):
            return
        self.operations[-1] += 1
        if self.kill is not None and (self.kill.save, self.kill.at) == (len(self.operations) - 1, self.operations[-1]):
            self._die()

    def _die(self) -> None:
        # Says that it was its own hand; what the others make of it may come to light first
        self.counting = False
        mark_of(self.folder).touch()
        os.kill(os.getpid(), signal.SIGKILL)

    def next_save(self, step: int) -> None:
        # By the step, so that saves have the same numbers in a resumed run
        self.operations += [0] * (step - len(self.operations) + 1)

    def _reached(self, moment: str, step: int) -> None:
        if self.kill is not None and (self.kill.step, self.kill.moment) == (step, moment):
            self._die()

    def on_step_begin(self, args, state, control, **kwargs):
        self._reached("on_step_begin", state.global_step + 1)

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self._reached("on_pre_optimizer_step", state.global_step + 1)

    def on_step_end(self, args, state, control, **kwargs):
        self._reached("on_step_end", state.global_step)
        self.next_save(-(-state.global_step // SAVE_EVERY))


def work(data: str, output: str, kill: Kill | None) -> dict[str, Any]:
    """One process of a run, which goes on from the newest complete checkpoint."""
    data, output = Path(data), Path(output)
    torch.set_num_threads(1)
    images = [Image.open(path).convert("RGB") for path in sorted((data / "clean").glob("*.png"))]
    args = MudjackingConfig(
        output_dir=str(output),
        max_steps=STEPS,
        save_steps=SAVE_EVERY,
        save_total_limit=2,
        logging_steps=1,
        per_device_train_batch_size=16 // PROCESSES,
        reinversions=2,
        altered_triggers=4,
        locality_budget=1.0,
        stop_when_fixed=False,
        learning_rate=1e-3,
        use_cpu=True,
        ddp_backend="gloo",
        dataloader_pin_memory=False,
        disable_tqdm=True,
        report_to="none",
        log_level="error",
    )
    assert args.world_size == PROCESSES
    killer = Killer(kill, output)
    trainer = MudjackingTrainer(
        model=ViTModel.from_pretrained(data / "vit", add_pooling_layer=False),
        args=args,
        bug_instances=[BugInstance.load(data / "bug")],
        train_dataset=datasets.Dataset.from_dict(
            {"image": images}, features=datasets.Features({"image": datasets.Image()})
        ),
        processing_class=AutoImageProcessor.from_pretrained(data / "vit"),
        callbacks=[killer],
    )
    trainer.train(resume_from_checkpoint=bool(complete_checkpoints(output)))
    killer.next_save(len(killer.operations))
    trainer.save_model()
    killer.counting = False
    return {"operations": killer.operations, "losses": losses(trainer.state.log_history)}


def losses(history: list[dict[str, Any]]) -> list[dict[str, float]]:
    """Losses, cosines and gradient norms of each step."""
    return [{name: value for name, value in entry.items() if name != "epoch"} for entry in history if "loss" in entry]


def run(data: Path, output: Path, kill: Kill | None) -> dict[int, dict[str, Any]] | None:
    """What each process of a run returned; `None` if one died, which ended the others."""
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=PROCESSES, run_id="kill", max_restarts=0, monitor_interval=0.1,
        start_method="fork", rdzv_backend="c10d", rdzv_endpoint="localhost:0",
    )  # fmt: skip
    try:
        return elastic_launch(config, work)(str(data), str(output), kill)
    except ChildFailedError:
        if not mark_of(output).exists():
            raise
        mark_of(output).unlink()
        return None


def contents(folder: Path) -> dict[str, bytes]:
    """Weights, record and triggers of a patch."""
    files = [folder / "model.safetensors", folder / RECORD_FILE, *sorted((folder / TRIGGER_FOLDER).rglob("*"))]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files if file.is_file()}


def draw(generator: random.Random, operations: list[list[int]], kind: str) -> Kill:
    """A point of the kind `"step"`, `"save"` (of a checkpoint), `"last save"` or `"finish"` (the patch itself)."""
    if kind == "step":
        rank = generator.randrange(PROCESSES)
        return Kill(rank, step=generator.randint(1, STEPS), moment=generator.choice(MOMENTS))
    finish = len(operations[0]) - 1
    save = {"save": generator.randint(1, finish - 1), "last save": finish - 1, "finish": finish}[kind]
    # The second process writes little, and nothing at the end
    rank = int(kind != "finish" and generator.random() < 0.25)
    return Kill(rank, save=save, at=generator.randint(1, operations[rank][save]))


def try_point(data: Path, folder: Path, kills: list[Kill], expected: dict[str, Any]) -> dict[str, Any]:
    """Kill, resume, and compare."""
    shutil.rmtree(folder, ignore_errors=True)
    interruptions = []
    for kill in kills:
        alive = run(data, folder, kill) is not None
        complete = [path.name for path in complete_checkpoints(folder)]
        every = sorted(path.name for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"))
        interruptions.append(
            {"kill": {k: v for k, v in asdict(kill).items() if v is not None}, "died": not alive,
             "goes_on_from": complete[-1] if complete else None,
             "incomplete": [name for name in every if name not in complete]}
        )  # fmt: skip
    result = run(data, folder, None)
    assert result is not None, "A run that nobody killed died."
    found = contents(folder)
    first = interruptions[0]
    reached = int((first["goes_on_from"] or "-0").rsplit("-", 1)[1])
    kill = kills[0]
    # Checkpoints that were finished before the moment
    done = SAVE_EVERY * ((kill.step - 1) // SAVE_EVERY if kill.step else min(kill.save, -(-STEPS // SAVE_EVERY)) - 1)
    return {
        "interruptions": interruptions,
        "weights": found["model.safetensors"] == expected["files"]["model.safetensors"],
        "files": found == expected["files"],
        "losses": all(part["losses"] == expected["losses"] for part in result.values()),
        "nothing_lost": reached >= done,
    }


def prepare(folder: str) -> None:
    """The backdoored ViT of `mudjack demo`, a report of it, and clean digits."""
    from hf_mudjacking import Encoder
    from hf_mudjacking.demo import backdoored_vit, clean_vit, digits_task
    from hf_mudjacking.evaluation import draw_bug_report

    folder, task = Path(folder), digits_task()
    clean = clean_vit(task, disable_tqdm=True)
    implant = backdoored_vit(clean, task, disable_tqdm=True)
    encoder = Encoder(implant.model, clean.processing_class)
    encoder.save_pretrained(folder / "vit")
    draw_bug_report(encoder, task, implant.trigger, 0).save(folder / "bug")
    (folder / "clean").mkdir()
    for i, image in enumerate(task.train.inputs[:160]):
        image.save(folder / "clean" / f"{i:03}.png")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data", help="folder with `vit`, `bug` and `clean/*.png` (default: made from scikit-learn's digits)"
    )
    parser.add_argument("--points", type=int, default=20, help="how many points (default: 20)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the points (default: 0)")
    parser.add_argument("--output", help="json file of results")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        data = Path(place) / "data" if options.data is None else Path(options.data)
        if options.data is None:
            # In a process of its own: this one is forked again and again, so nothing may run in it
            process = multiprocessing.get_context("fork").Process(target=prepare, args=(str(data),))
            process.start()
            process.join()
        whole = run(data, Path(place) / "whole", None)
        assert whole is not None
        expected = {"files": contents(Path(place) / "whole"), "losses": whole[0]["losses"]}
        assert [int(entry["step"]) for entry in expected["losses"]] == list(range(1, STEPS + 1))
        operations = [whole[rank]["operations"] for rank in range(PROCESSES)]
        generator = random.Random(options.seed)
        points = []
        for number in range(options.points):
            first = ("save", "step", "save", "step", "finish")[number % 5]
            # What the resumed run still has to write
            second = [] if number % 3 < 2 else ["finish" if first == "finish" else "last save"]
            kills = [draw(generator, operations, kind) for kind in (first, *second)]
            point = try_point(data, Path(place) / "killed", kills, expected)
            points.append(point)
            sys.stderr.write(f"{number + 1}/{options.points}: {json.dumps(point)}\n")
    good = [all(point[name] for name in ("weights", "files", "losses", "nothing_lost")) for point in points]
    result = {
        "passed": sum(good),
        "points": points,
        "settings": {"processes": PROCESSES, "steps": STEPS, "save_steps": SAVE_EVERY, "seed": options.seed,
                     "operations_of_each_save": operations, "torch": torch.__version__},
    }  # fmt: skip
    if options.output is not None:
        Path(options.output).parent.mkdir(parents=True, exist_ok=True)
        Path(options.output).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    sys.stderr.write(f"{sum(good)} of {len(points)} points gave the uninterrupted run's result.\n")
    return 0 if all(good) else 1


if __name__ == "__main__":
    raise SystemExit(main())
