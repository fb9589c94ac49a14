# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""The files around a transformer in a sentence-transformers checkpoint: which pooling it names, and writing them back."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from .safe_loading import inside, read_json


logger = logging.getLogger(__name__)

_MODULES, _PROMPTS = "modules.json", "config_sentence_transformers.json"
_FILES = (
    _MODULES,
    _PROMPTS,
    "sentence_*_config.json",
    "*_*/config.json",
    "*_*/*.safetensors",
)
# Modules that this library does the work of; `Normalize` is applied to all features.
_KNOWN_MODULES = ("Transformer", ".Pooling", ".Normalize")
# Poolings by their name in the file, as this library calls them.
_POOLINGS = {"mean": "mean", "mean_tokens": "mean", "cls": "cls", "cls_token": "cls"}


@dataclass(frozen=True)
class SentenceLayout:
    """What a sentence-transformers checkpoint holds beside the transformer itself.

    Args:
        pooling (`str`): `"mean"` or `"cls"`, or the file's own name of a pooling that this library does not have.
        max_seq_length (`int`, *optional*): Tokens that its sentences are cut to.
        files (`dict[str, bytes]`): Contents by relative path; json and safetensors only.
    """

    pooling: str
    max_seq_length: int | None
    files: dict[str, bytes]

    @classmethod
    def read(cls, name: str | os.PathLike[str], **hub: Any) -> SentenceLayout | None:
        """Read them from a local folder or, for a Hub id, from the Hub or its cache; `None` where there are none.

        Raises:
            ValueError: If `modules.json` is there but it or the pooling file cannot be understood, or texts are put into lower case
                before the tokenizer.
        """
        folder = _folder(name, **hub)
        if folder is None or not (folder / _MODULES).is_file():
            return None
        names = [path.relative_to(folder).as_posix() for pattern in _FILES for path in sorted(folder.glob(pattern))]
        found = {name: inside(folder, name) for name in names}
        try:
            modules = read_json(found[_MODULES], list)
            transformer = next(module for module in modules if module["type"].endswith("Transformer"))
            pooling = next(module for module in modules if module["type"].endswith(".Pooling"))
            mode = _pooling(read_json(inside(folder, f"{pooling['path']}/config.json")))
            sentence_config = inside(folder, str(PurePosixPath(transformer["path"]) / "sentence_bert_config.json"))
            settings = read_json(sentence_config) if sentence_config.is_file() else {}
            length = settings.get("max_seq_length")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, StopIteration) as error:
            raise ValueError(
                f"`{name}` has a `{_MODULES}`, but it names no transformer with a readable pooling ({error!r}). Pass "
                "`feature_source='mean'` or `'cls'` and a copy of the checkpoint without that file."
            ) from error
        further = [module["type"] for module in modules if not str(module["type"]).endswith(_KNOWN_MODULES)]
        if further:
            logger.warning(
                f"`{name}` goes on after the pooling with {', '.join(further)}: what is repaired and measured are the features before "
                "that, and its files are kept as they are."
            )
        if settings.get("do_lower_case"):
            raise ValueError(
                f"`{name}` has texts put into lower case before they are tokenized (`do_lower_case` in `sentence_bert_config.json`), "
                "which is not done here: other tokens would be repaired than are served. Pass a copy without that setting, whose "
                "tokenizer does so itself."
            )
        own = read_json(found[_PROMPTS]) if _PROMPTS in found else {}
        if own.get("default_prompt_name"):
            logger.warning(
                f"`{name}` puts the prompt `{own['default_prompt_name']}` before each text where sentence-transformers serves it, which "
                "is not done here. Put it before reports and clean texts yourself."
            )
        files = {path: file.read_bytes() for path, file in found.items()}
        if transformer["path"]:
            # The patched transformer is saved at the top, where AutoModel looks for it too.
            files = {path: data for path, data in files.items() if PurePosixPath(path).parts[0] != transformer["path"]}
            transformer["path"] = ""
            files[_MODULES] = json.dumps(modules, indent=2).encode()
        return cls(mode, length, files)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write them into a folder beside a saved transformer, so that sentence-transformers loads the whole."""
        for path, data in self.files.items():
            (Path(folder) / path).parent.mkdir(parents=True, exist_ok=True)
            (Path(folder) / path).write_bytes(data)


def _folder(name: str | os.PathLike[str], **hub: Any) -> Path | None:
    if Path(name).is_dir():
        return Path(name)
    try:
        hf_hub_download(str(name), _MODULES, **hub)
        return Path(snapshot_download(str(name), allow_patterns=list(_FILES), **hub))
    except LocalEntryNotFoundError as error:
        if try_to_load_from_cache(str(name), _MODULES, **hub) is _CACHED_NO_EXIST:
            return None
        if isinstance(error.__cause__, HfHubHTTPError):
            raise ValueError(
                f"The Hub did not say whether `{name}` is a checkpoint of sentence-transformers ({error.__cause__}), and its "
                "features would be read elsewhere if it is. Try again later, or pass the folder of a copy."
            ) from error
        logger.warning(
            f"Without the Hub it is not known whether `{name}` is a checkpoint of sentence-transformers; it is read as a bare "
            "model. If it is one, pass `feature_source='mean'` or what its pooling file says, or load it once with the Hub."
        )
        return None
    # It has none, or there is no such repo, of which loading the model says more
    except (OSError, HfHubHTTPError, HFValidationError):
        return None


def _pooling(config: dict[str, Any]) -> str:
    """The pooling a file names: up to version 5 one flag for each kind, then a name."""
    named = config.get("pooling_mode")
    modes = [named] if isinstance(named, str) else list(named or [])
    modes += [
        key.removeprefix("pooling_mode_") for key, value in config.items() if key[:13] == "pooling_mode_" and value
    ]
    if len(modes) != 1:
        raise ValueError(f"its pooling file names the poolings {modes}; exactly one can be read")
    return _POOLINGS.get(modes[0], modes[0])
