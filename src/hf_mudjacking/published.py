# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""What of a patch may leave the machine: a list of files, and of facts in its record. All else stays.

The folder of a patch also holds what was found in the reports (`_triggers/`: pixels of x_b), pictures of them, logs,
checkpoints. A list of what to leave out would miss the next such file; so this is a list of what goes.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from .output import ADAPTER_FILES, DELTA_FILES, FULL_WEIGHTS
from .patch_record import check_whole, modality_of_patch, read_record
from .safe_loading import ADAPTER_CONFIG, WEIGHTS_INDEX, inside, shards_of
from .weight_files import is_adapter


CARD_FILE = "README.md"
# Model, processor, tokenizer, and the layout of sentence-transformers.
_FILES = (
    *FULL_WEIGHTS,
    *ADAPTER_FILES,
    *DELTA_FILES,
    "config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "spm.model",
    "tokenizer.model",
    "chat_template.jinja",
    "modules.json",
    "config_sentence_transformers.json",
    "sentence_bert_config.json",
    "[0-9]_*/config.json",
    "[0-9]_*/*.safetensors",
)
# Numbers, or text that this library wrote.
_FACTS = (
    "hf_mudjacking",
    "kind",
    "base_revision",
    "base_weights_sha256",
    "base_weights_without",
    "modality",
    "feature_source",
    "patched_tokens",
    "moved_levels",
    "merge_error",
    "steps",
    "trigger_groups",
    "skipped",
    "evidence",
)
# The only texts among the facts about a trigger and a verdict. A text trigger's own words are never one of them.
_NAMED = ("kind", "placement", "verdict")
_RATES = ("clean", "before", "after", "other_classifiers")


def published_files(folder: str | os.PathLike[str]) -> dict[str, Path]:
    """The files of a patch that are uploaded as they are, by their path in the repo.

    Card, record and an adapter's configuration are not among them: they are written anew for the upload.

    Raises:
        ValueError: If the folder holds no patch or one that was not written whole, parts of its weights are missing, or a file is a
            link out of it.
    """
    folder = Path(folder)
    record = read_record(folder)
    if record is None:
        raise ValueError(
            f"`{folder}` holds no patch of hf-mudjacking: it has no readable `mudjacking.json`. Pass the folder that "
            "`mudjack patch` or `trainer.save_model()` wrote."
        )
    check_whole(folder, record)
    paths = {path for pattern in _FILES for path in folder.glob(pattern) if path.is_file()}
    files = {(name := path.relative_to(folder).as_posix()): inside(folder, name) for path in sorted(paths)}
    weights = [path for pattern in (*FULL_WEIGHTS, *ADAPTER_FILES, *DELTA_FILES) for path in folder.glob(pattern)]
    if not any(path.suffix == ".safetensors" for path in weights):
        raise ValueError(f"`{folder}` holds a record but no weights. Run `trainer.save_model()` again.")
    if WEIGHTS_INDEX in files:
        missing = set(shards_of(folder).values()) - files.keys()
        if missing:
            raise ValueError(f"`{folder}` lacks parts of its weights: {', '.join(sorted(missing))}. Save it again.")
    files.pop(ADAPTER_CONFIG, None)
    return files


def base_on_hub(record: dict[str, Any]) -> str | None:
    """The Hub id of the model that was patched; `None` if it was loaded from a folder or built in memory.

    Only what came from the Hub has a commit; a name alone may as well be a path on the machine where the patch was made.
    """
    return record.get("base_model") if record.get("base_revision") else None


def published_record(folder: str | os.PathLike[str], base_model: str | None) -> dict[str, Any]:
    """The record of a patch without what says more than it must.

    Left out are paths, words, and ids of reports that are texts: whoever guesses a text could confirm it by its hash.

    Args:
        folder (`str` or `os.PathLike`): Folder of a patch.
        base_model (`str`, *optional*): Hub id of the model that was patched.

    Returns:
        `dict`: With the keys of the record; `base_model` is empty where the Hub does not know it. `figures` come from
        `report.json` beside the record where it has none itself.
    """
    record = read_record(folder) or {}
    pictures = modality_of_patch(record) == "image"
    return {
        **{name: record[name] for name in _FACTS if name in record},
        "kind": record.get("kind") or ("lora" if is_adapter(folder) else "full"),
        "base_model": base_model or "",
        "bug_ids": record.get("bug_ids", []) if pictures else [],
        **{name: _facts(record.get(name, [])) for name in ("triggers", "screenings", "remembered")},
        "locality": _facts(record.get("locality")),
        "settings": _facts(record.get("settings", {})),
        "versions": record.get("versions", {}),
        "figures": {task: _rates(block) for task, block in _figures(folder, record).items()},
    }


def _facts(value: Any) -> Any:
    """Numbers, and texts by the few names that may have one."""
    if isinstance(value, dict):
        return {
            name: item if name in _NAMED else _facts(item)
            for name, item in value.items()
            if name in _NAMED or not isinstance(item, str)
        }
    if isinstance(value, list):
        return [_facts(item) for item in value if not isinstance(item, str)]
    return value


def _figures(folder: str | os.PathLike[str], record: dict[str, Any]) -> dict[str, dict[str, Any]]:
    # One of an earlier version has none. Where nothing was measured the report is of another patch that was here
    if record["figures"] is not None:
        return record["figures"]
    try:
        report = json.loads((Path(folder) / "report.json").read_text(encoding="utf-8"))
        settings = report.get("settings", {})
        return {settings.get("task", "task"): {**report, **settings}, **report.get("other_tasks", {})}
    except (OSError, ValueError, AttributeError):
        return {}


def _rates(block: dict[str, Any]) -> dict[str, Any]:
    named = {name: block[name] for name in ("classifier", "trigger_measured") if name in block}
    return {**named, **{name: _facts(block[name]) for name in _RATES if name in block}}
