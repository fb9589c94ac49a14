# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""Options that several commands share, and `--config`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import yaml


if TYPE_CHECKING:
    import datasets
    from torch import nn

    from ..bug_instance import BugInstance
    from ..encoder import Encoder
    from ..preprocessing import Modality, RawInput
    from ..screening import Screening


# Clean inputs that candidates are verified on, at least; as `inversion_inputs` has it.
_LEAST_INPUTS = 4


def add_config(parser: argparse.ArgumentParser) -> None:
    """`--config` and `--disable-tqdm`."""
    parser.add_argument("--config", metavar="FILE", help="YAML file of options; the command line overrides it")
    parser.add_argument("--disable-tqdm", action="store_true", help="show no progress bars")


class Several(argparse.Action):
    """Like `action="append"`, or `"extend"` where `nargs` is given, except that the command line replaces what the config
    file says."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | list[str],
        option: str | None = None,
    ) -> None:
        given, values = getattr(namespace, self.dest), values if isinstance(values, list) else [values]
        setattr(namespace, self.dest, values if given is self.default else [*given, *values])


class Once(argparse.Action):
    """An option that may be given once: of two values the first would be lost without a word."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        if getattr(namespace, self.dest) is not self.default:
            parser.error(f"{option} was given twice; one report at a time")
        setattr(namespace, self.dest, values)


def add_report(parser: argparse.ArgumentParser, several: bool = False) -> None:
    """The model, the bug report or several, and the clean inputs."""
    parser.add_argument("--model", help="Hub id or folder of the backdoored encoder")
    parser.add_argument(
        "--processor", help="Hub id or folder of its image processor or tokenizer (default: the model's)"
    )
    parser.add_argument("--misclassified", metavar="FILE", help="misclassified input x_b: an image, or a .txt file")
    parser.add_argument("--reference", metavar="FILE", help="correctly classified input x_r of the same class")
    parser.add_argument("--misclassified-text", metavar="TEXT", help="the same as a text on the command line")
    parser.add_argument("--reference-text", metavar="TEXT", help="the same as a text on the command line")
    again = "; once for each report" if several else ""
    parser.add_argument(
        "--bug",
        metavar="FOLDER",
        action=Several if several else Once,
        help=f"bug folder, instead of the two inputs{again}",
    )
    parser.add_argument("--dataset", help="clean, unlabelled inputs: Hub id, .parquet or .txt file, folder")
    parser.add_argument(
        "--split",
        default="train",
        help="its split, where it has several: a file is one whatever this says (default: train)",
    )
    parser.add_argument("--input-column", help="its column of inputs (default: image or text)")
    parser.add_argument("--streaming", action="store_true", help="read the dataset as a stream")
    parser.add_argument("--feature-source", default="auto", help="auto, cls, mean, pooler or projection")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything (default: 0)")


def apply_config_file(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> None:
    """Make the values of `--config FILE` the parser's defaults; unknown keys and wrong types are errors."""
    finder = argparse.ArgumentParser(
        prog=parser.prog, usage=parser.format_usage()[7:], add_help=False, allow_abbrev=False
    )
    finder.add_argument("--config")
    path = finder.parse_known_args(list(arguments))[0].config
    if path is None:
        return
    try:
        with open(path, encoding="utf-8") as file:
            values = yaml.safe_load(file) or {}
    # A date that there is not gives a bare `ValueError`
    except (OSError, ValueError, yaml.YAMLError) as error:
        parser.error(f"--config {path} cannot be read: {error}")
    if not isinstance(values, dict):
        parser.error(f"--config {path} must hold `option: value` lines")
    actions = {action.dest: action for action in parser._actions if action.dest not in ("help", "config")}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in actions:
            known = ", ".join(sorted(action.replace("_", "-") for action in actions))
            parser.error(f"--config {path}: unknown option `{key}`; known are: {known}")
        action = actions[name]
        if isinstance(action, argparse._StoreTrueAction):
            if not isinstance(value, bool):
                parser.error(f"--config {path}: `{key}` must be true or false, not {value!r}")
        elif isinstance(action, Several):
            items = [item for item in (value if isinstance(value, list) else [value]) if item is not None]
            if not all(isinstance(item, str | int) and not isinstance(item, bool) for item in items):
                parser.error(f"--config {path}: `{key}: {value!r}` is no text as it stands; put it in quotes")
            value = [str(item) for item in items] or None
        elif value is None and action.nargs == "?":
            # It could mean either: the option alone, or none
            parser.error(
                f"--config {path}: `{key}` has no value; give one (`{key}: {action.const}`), or leave the line out"
            )
        elif value is None:
            if action.type in (int, float) and action.default is not None:
                parser.error(f"--config {path}: `{key}` has no value; give one, or leave the line out")
        else:
            nested = isinstance(value, (list, dict))
            try:
                if nested and action.type is None:
                    raise TypeError
                if action.type is None and (isinstance(value, bool) or not isinstance(value, str | int)):
                    # YAML has read `no` as false, `1.10` as a number, and a day as a date
                    parser.error(f"--config {path}: `{key}: {value!r}` is no text as it stands; put it in quotes")
                # As text, like on the command line: what is no whole number is refused, not rounded
                given = value if nested else str(value)
                value = given if action.type is None else action.type(given)
            except (TypeError, ValueError, argparse.ArgumentTypeError):
                parser.error(f"--config {path}: `{key}: {value!r}` is not a valid value")
            if action.choices is not None and value not in action.choices:
                parser.error(f"--config {path}: `{key}` must be one of {', '.join(map(str, action.choices))}")
        parser.set_defaults(**{name: value})


def clean_inputs_from(options: argparse.Namespace, modality: Modality) -> datasets.Dataset | datasets.IterableDataset:
    """The clean dataset that the options name, its column of inputs renamed to `image` or `text`."""
    from ..named_datasets import load_inputs

    dataset = load_inputs(options.dataset, options.split, options.streaming)
    if options.input_column in (None, modality):
        return dataset
    if dataset.column_names is not None and options.input_column not in dataset.column_names:
        raise ValueError(
            f"--input-column {options.input_column}: `{options.dataset}` has the columns {', '.join(dataset.column_names)}"
        )
    if dataset.column_names is not None:
        # Another may have the name that it is to get
        dataset = dataset.select_columns([options.input_column])
    return dataset.rename_column(options.input_column, modality)


def screener(
    options: argparse.Namespace, model: nn.Module, modality: Modality
) -> tuple[Encoder, list[RawInput], Callable[[BugInstance], Screening]]:
    """The encoder, the clean inputs that triggers are verified on, and what judges a report as the options have it."""
    from ..clean_inputs import clean_inputs
    from ..encoder import Encoder
    from ..loading import load_processor
    from ..reports import OTHER_INPUTS, verification_inputs
    from ..screening import screen_report

    dataset = clean_inputs_from(options, modality)
    inputs, others = verification_inputs(
        clean_inputs(modality, dataset, options.inputs + OTHER_INPUTS, options.seed, "dataset"),
        options.inputs,
        options.seed,
    )
    processor = load_processor(options.processor or options.model, model)
    encoder = Encoder(model, processor, options.feature_source, modality)

    def screened(bug: BugInstance) -> Screening:
        return screen_report(
            encoder,
            bug,
            inputs,
            others,
            min_evidence=options.min_evidence,
            seed=options.seed,
            disable_tqdm=options.disable_tqdm,
        )

    return encoder, inputs, screened


def check_inputs(options: argparse.Namespace) -> None:
    """Refuse fewer clean inputs than candidates can be verified on, and evidence that nothing has."""
    if options.inputs < _LEAST_INPUTS:
        raise ValueError(f"--inputs {options.inputs}: at least {_LEAST_INPUTS} clean inputs are needed")
    from ..config import EVIDENCE_RANGE

    least, most = EVIDENCE_RANGE
    if not least <= options.min_evidence <= most:
        raise ValueError(f"--min-evidence {options.min_evidence}: evidence lies between {least:g} and {most:g}")


def require(options: argparse.Namespace, *names: str) -> None:
    """Complain about options that were given neither on the command line nor in the config file."""
    missing = [f"--{name.replace('_', '-')}" for name in names if getattr(options, name) is None]
    if missing:
        raise ValueError(f"missing: {', '.join(missing)} (on the command line or in --config)")


def bugs_from(options: argparse.Namespace) -> list[BugInstance]:
    """The bug instance that the options name, or the several."""
    from ..bug_instance import BugInstance

    files, texts = ("misclassified", "reference"), ("misclassified_text", "reference_text")
    given = [name for name in (*files, *texts, "bug") if getattr(options, name) is not None]
    if given == ["bug"]:
        return [
            BugInstance.load(folder) for folder in ([options.bug] if isinstance(options.bug, str) else options.bug)
        ]
    if given == list(texts):
        return [BugInstance(options.misclassified_text, options.reference_text)]
    if set(given) <= set(files):
        require(options, *files)
        return [BugInstance.from_files(options.misclassified, options.reference)]
    raise ValueError(
        "give one report: --misclassified FILE --reference FILE, or --misclassified-text TEXT --reference-text TEXT, or "
        "--bug FOLDER"
    )
