# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""The model card of a patch, made from its record, within whatever card there is already."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData, constants
from huggingface_hub.repocard import RepoCard

from .loading import loading_class
from .patch_record import modality_of_patch
from .published import published_record
from .safe_loading import ADAPTER_CONFIG


TAGS = ("hf-mudjacking", "backdoor-repair")
_TEMPLATE = Path(__file__).parent / "templates" / "patch_card.md"
_SECTION = re.compile(r"<!-- hf-mudjacking: begin -->.*?<!-- hf-mudjacking: end -->", re.DOTALL)
# What our entry of a model index ends in.
_OURS = " (repaired)"
_METRICS = {"CA": "accuracy", "BA": "accuracy", "ASR": "attack_success_rate", "ASR-B": "attack_success_rate",
            "RA": "robust_accuracy"}  # fmt: skip
# Lists that are joined with those of an earlier card.
_JOINED = ("tags", "datasets")
# What an earlier card may say otherwise, and is then right.
_YIELDING = ("license", "license_name", "license_link", "language", "pipeline_tag")
_UNKNOWN = "–"


def patch_card(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    base_model: str | None = None,
    earlier: str | None = None,
    metadata: dict[str, Any] | None = None,
    base_metadata: dict[str, Any] | None = None,
    unrepaired: Sequence[str] = (),
    shared: bool = False,
) -> str:
    """The card of a patch: what was reported and found, rates before and after, limits, and how to load it.

    Nothing in it is of the reported inputs, nor the words of a text trigger.

    Args:
        folder (`str` or `os.PathLike`): Folder of the patch; its record and, where that has no figures, `report.json` are read.
        repo_id (`str`): Repo that the card is for, or the name of the patch where there is none yet.
        base_model (`str`, *optional*): Hub id of the model that was patched; `None` if the Hub does not know it.
        earlier (`str`, *optional*): Card that is there already. Its text stays, but for an earlier section of ours; so does
            its metadata, but for what says of which model this one is.
        metadata (`dict`, *optional*): Further metadata, which comes before all other.
        base_metadata (`dict`, *optional*): Licence, language, pipeline tag and library of the base model, for where the
            earlier card has none.
        unrepaired (`Sequence[str]`, *optional*): Files of the repo that still hold weights from before the repair.
        shared (`bool`, *optional*, defaults to `False`): Whether reports and triggers are in the repo.

    Returns:
        `str`: Metadata and Markdown.

    Raises:
        ValueError: If the metadata of the earlier card cannot be read.
    """
    record = published_record(folder, base_model)
    name = repo_id.rsplit("/", 1)[-1]
    repairs_itself = repo_id == base_model
    data = ModelCardData(
        tags=list(TAGS),
        eval_results=_eval_results(record) or None,
        model_name=f"{name}{_OURS}",
        **({} if repairs_itself else _relation(folder, record, base_metadata or {})),
    )
    if not data.eval_results:
        data.pop("model_name")
    shown = [screening for i, screening in enumerate(record["screenings"]) if i not in record.get("skipped", [])]
    card = ModelCard.from_template(
        data,
        template_path=str(_TEMPLATE),
        name=name,
        repo=repo_id,
        kind=record["kind"],
        base=f"[{base_model}]({constants.ENDPOINT}/{base_model})" if base_model else "a model that is not on the Hub",
        base_id=base_model,
        repairs_itself=repairs_itself,
        reports=_count(len(record["triggers"]), "bug report"),
        triggers=[_trigger_row(i, *row) for i, row in enumerate(_padded(record["triggers"], shown, record))],
        remembered=", ".join(map(_remembered, record["remembered"])),
        bug_ids=", ".join(f"`{_cell(bug_id)}`" for bug_id in record["bug_ids"]),
        unrepaired=", ".join(f"`{_cell(path)}`" for path in unrepaired),
        shared=shared,
        figures=_figure_rows(record),
        measured_with=_measured_with(record),
        limits=_limits(record, repairs_itself),
        code=_code(folder, repo_id, base_model, record),
        facts=_made_with(record),
    )
    return _merged(card, earlier, metadata or {})


def card_metadata(
    language: str | None = None,
    license: str | None = None,
    tags: str | list[str] | None = None,
    tasks: str | list[str] | None = None,
    dataset_tags: str | list[str] | None = None,
    **unused: Any,
) -> dict[str, Any]:
    """Metadata in the words of [`~transformers.Trainer.create_model_card`], as a card has them; see there."""
    return {
        "language": language,
        "license": license,
        "tags": _listed(tags),
        "pipeline_tag": next(iter(_listed(tasks)), None),
        "datasets": _listed(dataset_tags),
    }


def _merged(card: ModelCard, earlier: str | None, metadata: dict[str, Any]) -> str:
    """Our section and metadata put into an earlier card, or into one of its own."""
    ours = {**card.data.to_dict(), **{key: value for key, value in metadata.items() if value is not None}}
    for key in _JOINED:
        both = [*_listed(card.data.get(key)), *_listed(metadata.get(key))]
        if both:
            ours[key] = list(dict.fromkeys(both))
    try:
        # Not as a ModelCard, which would take the model index apart
        result = RepoCard(str(card) if earlier is None else earlier)
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(
            f"The metadata at the head of the card (`README.md`) that is there already cannot be read ({error}). Correct it "
            "first, so that nothing of it is lost."
        ) from error
    section = _SECTION.search(card.text).group()
    if _SECTION.search(result.text):
        result.text = _SECTION.sub(lambda _: section, result.text, count=1)
    else:
        result.text = f"{result.text.rstrip()}\n\n{section}\n"
    for key, value in ours.items():
        there = result.data.get(key)
        if key in _JOINED:
            value = list(dict.fromkeys([*_listed(there), *value]))
        elif key == "model-index":
            value = [*(entry for entry in there or [] if not str(entry.get("name")).endswith(_OURS)), *value]
        elif key in _YIELDING and there is not None and metadata.get(key) is None:
            continue
        result.data[key] = value
    return str(result)


def _relation(folder: str | os.PathLike[str], record: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    """Metadata of a repo of its own: what it is of, and what that says of itself."""
    full = record["kind"] == "full"
    sentences = (Path(folder) / "modules.json").is_file()
    of_base = base.get("library_name") or ("sentence-transformers" if sentences else "transformers")
    library = {"lora": "peft", "full": of_base}.get(record["kind"], "hf-mudjacking")
    relation = {"base_model": record["base_model"], "base_model_relation": "finetune" if full else "adapter"}
    return {
        **(relation if record["base_model"] else {}),
        "library_name": library,
        **{key: base[key] for key in _YIELDING if base.get(key) is not None},
    }


# ---- Rows of its tables ----


def _padded(triggers: list[Any], screenings: list[Any], record: dict[str, Any]) -> Iterable[tuple[Any, Any, Any]]:
    """Trigger, verdict and evidence of each report; the latter two are there only where it was inverted."""
    for i, trigger in enumerate(triggers):
        evidence = record.get("evidence", [])
        yield trigger, screenings[i] if i < len(screenings) else {}, evidence[i] if i < len(evidence) else None


def _trigger_row(number: int, trigger: dict[str, Any] | None, screening: dict[str, Any], evidence: Any) -> list[str]:
    found = [_number(screening.get("transfer")), _number(evidence), _cell(screening.get("verdict", "given"))]
    if trigger is None:
        return [str(number + 1), "none was verified, repaired without", _UNKNOWN, _UNKNOWN, *found]
    return [str(number + 1), _cell(trigger["kind"]), *_size_and_place(trigger), *found]


def _size_and_place(trigger: dict[str, Any]) -> tuple[str, str]:
    whole = "the whole picture"
    match trigger["kind"]:
        case "patch":
            top, left, bottom, right = trigger["box"]
            height, width = trigger["size"]
            box = f"rows {top + 1} to {bottom}, columns {left + 1} to {right} of {height} × {width}"
            place = "anywhere" if trigger.get("placement") == "anywhere" else box
            return f"{trigger['area']:.1%} of the picture", place
        case "blend":
            return f"opacity {trigger['opacity']:.2f}", f"{trigger['area']:.0%} of the picture"
        case "additive":
            return f"{trigger['levels']:.1f} of 255 levels on average", whole
        case "warp":
            return f"{trigger['shift']:.1%} of the side on average", whole
        case "text":
            position = trigger.get("position")
            place = {None: "anywhere", 0: "at the front", -1: "at the end"}.get(position, f"at word {position}")
            spans = f" in {trigger['spans']} places" if trigger["spans"] > 1 else ""
            return f"{_count(trigger['words'], 'word')}{spans}", place
    return _UNKNOWN, _UNKNOWN


def _remembered(trigger: dict[str, Any]) -> str:
    before, after = _number(trigger.get("cosine_before"), 3), _number(trigger.get("cosine_after"), 3)
    return (
        f"{_cell(trigger['kind'])} (cosine of stamped with clean features {before} before this one, {after} after it)"
    )


def _blocks(record: dict[str, Any]) -> Iterable[tuple[str, str, dict[str, Any]]]:
    """Task, classifier and its rates."""
    for task, block in record["figures"].items():
        yield task, str(block.get("classifier", "main")), block
        for classifier, other in block.get("other_classifiers", {}).items():
            yield task, classifier, other


def _measurements(block: dict[str, Any]) -> Iterable[tuple[str, dict[str, Any]]]:
    """What was measured, and its rates, by the order of a table."""
    clean, before, after = (block.get(part) or {} for part in ("clean", "before", "after"))
    rows = {
        "never attacked": clean,
        "before the repair": before.get("kept", {}),
        "repaired, classifier kept": after.get("kept", {}),
        "repaired, classifier retrained": after.get("retrained", {}),
    }
    return ((row, rates) for row, rates in rows.items() if rates)


def _figure_rows(record: dict[str, Any]) -> list[list[str]]:
    fixed = {True: "yes", False: "no"}
    return [
        [
            _cell(task),
            _cell(classifier),
            row,
            _percent(rates.get("BA", rates.get("CA"))),
            _percent(rates.get("ASR", rates.get("ASR-B"))),
            _percent(rates.get("RA")),
            fixed.get(rates.get("bug_fixed"), ""),
        ]
        for task, classifier, block in _blocks(record)
        for row, rates in _measurements(block)
    ]


def _eval_results(record: dict[str, Any]) -> list[EvalResult]:
    task_type = "text-classification" if modality_of_patch(record) == "text" else "image-classification"
    return [
        EvalResult(
            task_type=task_type,
            dataset_type=task,
            dataset_name=task,
            metric_type=_METRICS[metric],
            metric_name=f"{metric} ({row}, {classifier})",
            metric_value=value,
        )
        for task, classifier, block in _blocks(record)
        for row, rates in _measurements(block)
        for metric, value in rates.items()
        if metric in _METRICS
    ]


def _measured_with(record: dict[str, Any]) -> str:
    with_what = {
        "true": " ASR and RA are measured with the attacker's own trigger.",
        "inverted": " ASR and RA are measured with the trigger that was found, not with the attacker's own.",
        "unverified": " ASR and RA are measured with a candidate that was not verified to be the trigger.",
    }
    named = {block.get("trigger_measured") for block in record["figures"].values()} - {None}
    return "".join(with_what.get(name, "") for name in sorted(named))


# ---- Limits, code, settings ----


def _limits(record: dict[str, Any], repairs_itself: bool) -> list[str]:
    limits = [
        "Only what was reported is repaired. Other triggers of the same backdoor, and other backdoors, may remain: each "
        "needs a report of its own."
    ]
    if repairs_itself and record["kind"] == "lora":
        limits.append(
            "The weights of this repo are as they were: the repair is in effect only where the adapter is loaded. "
            "transformers does so by itself where `peft` is installed, and silently does not where it is missing."
        )
    if any(trigger is None for trigger in record["triggers"]):
        limits.append("In at least one report no trigger was verified; it was repaired without one.")
    if record.get("skipped"):
        limits.append(f"Left out, because it could not be believed: {_count(len(record['skipped']), 'report')}.")
    locality = record["locality"]
    if locality:
        nearest = max(locality.get("nearest") or [locality["mean"]])
        limits.append(
            f"Features of clean inputs moved by a cosine distance of {locality['mean']:.4f} on average, {nearest:.4f} for "
            "those most like a reported input. Both were measured on inputs like those of the repair; others may move further."
        )
    else:
        limits.append("How far features of clean inputs moved was not recorded.")
    if not record["figures"]:
        limits.append("Not checked: downstream accuracy, attack success rate, robust accuracy.")
    elif not any(block.get("clean") for block in record["figures"].values()):
        limits.append("Not compared with an encoder that was never attacked: none was at hand.")
    if record.get("patched_tokens"):
        limits.append(
            f"Only the embeddings of {_count(record['patched_tokens'], 'token')} changed. Texts without them have the same "
            "features as before, to the last bit; compared with the original, the weights show which tokens these are."
        )
    return limits


def _code(folder: str | os.PathLike[str], repo_id: str, base_model: str | None, record: dict[str, Any]) -> str:
    base, class_name = base_model or "path/to/the/original", _class_name(folder)
    if record["kind"] == "full":
        return f'from transformers import {class_name}\n\nmodel = {class_name}.from_pretrained("{repo_id}")'
    if record["kind"] == "delta":
        return "# A delta is applied to the original before it is loaded; see below."
    revision = record.get("base_revision")
    pinned = f', revision="{revision}"' if revision and base_model else ""
    return "\n".join(
        (
            "from peft import PeftModel",
            f"from transformers import {class_name}",
            "",
            f'model = {class_name}.from_pretrained("{base}"{pinned})',
            f'model = PeftModel.from_pretrained(model, "{repo_id}")',
            "model = model.merge_and_unload()  # optional: plain weights again",
        )
    )


def _class_name(folder: str | os.PathLike[str]) -> str:
    """Name of the class that loads the model."""
    config = _json(Path(folder) / "config.json").get("architectures") or [None]
    adapted = (_json(Path(folder) / ADAPTER_CONFIG).get("auto_mapping") or {}).get("base_model_class")
    return loading_class(adapted or config[0]).__name__


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _made_with(record: dict[str, Any]) -> list[tuple[str, str]]:
    facts = {
        "base revision": record.get("base_revision"),
        "SHA-256 of the base weights": record.get("base_weights_sha256"),
        "features": record.get("feature_source"),
        "steps": record.get("steps"),
        "levels of 255 that stamped pictures were moved by": record.get("moved_levels"),
        **{key.replace("_", " "): value for key, value in record["settings"].items()},
        **{key.replace("_", "-"): value for key, value in record["versions"].items()},
        **({} if record["versions"] else {"hf-mudjacking": record.get("hf_mudjacking")}),
    }
    return [(_cell(key), _cell(value)) for key, value in facts.items() if value is not None]


# ---- Small helpers ----


def _listed(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]


def _cell(value: Any) -> str:
    """Text that stays within a cell of a table, and is no markup."""
    return " ".join(str(value).split()).replace("|", "\\|").replace("<", "&lt;")


def _count(count: int, thing: str) -> str:
    return f"{count} {thing}{'s' * (count != 1)}"


def _number(value: float | None, digits: int = 2) -> str:
    return _UNKNOWN if value is None else f"{value:.{digits}f}"


def _percent(rate: float | None) -> str:
    return _UNKNOWN if rate is None else f"{100 * rate:.1f}"
