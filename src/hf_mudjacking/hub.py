# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""Patches on the Hub: one commit with weights, card and record, into a repo of its own or as a pull request."""

from __future__ import annotations

import fnmatch
import json
import logging
import os
import shlex
import tempfile
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, ModelInfo, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

from . import __version__
from .bug_instance import BugInstance
from .hub_errors import explained
from .model_card import patch_card
from .output import ADAPTER_FILES, DELTA_FILES, FULL_WEIGHTS, TRIGGER_FOLDER
from .patch_record import RECORD_FILE, read_record
from .published import CARD_FILE, base_on_hub, published_files, published_record
from .safe_loading import ADAPTER_CONFIG, check_folder, inside, read_json
from .weight_files import is_adapter


logger = logging.getLogger(__name__)

BUG_FOLDER = "bug_instances"
SHARED_TRIGGER_FOLDER = "triggers"
# Files that hold weights, in whatever format.
_WEIGHT_SUFFIXES = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".h5",
    ".msgpack",
    ".onnx",
    ".gguf",
    ".tflite",
    ".ot",
)
_BASE_METADATA = ("license", "license_name", "license_link", "language", "pipeline_tag")
# Uploads that nobody waits for, one after the other: each is a commit on top of the one before it.
_BACKGROUND = ThreadPoolExecutor(max_workers=1, thread_name_prefix="push")


def push_patch(
    folder: str | os.PathLike[str],
    repo_id: str | None = None,
    *,
    create_pr: bool = False,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    token: str | None = None,
    base_model: str | None = None,
    bug_instances: Sequence[BugInstance | str | os.PathLike[str]] = (),
    metadata: dict[str, Any] | None = None,
    blocking: bool = True,
) -> CommitInfo | Future[CommitInfo]:
    """Upload a patch in one commit: weights or adapter, processing class, card and record.

    What is uploaded is listed in [`~hf_mudjacking.published.published_files`]; all else in the folder stays on the machine.
    Weights of an earlier patch, which would be loaded instead, are removed from the repo in the same commit.

    Args:
        folder (`str` or `os.PathLike`): Folder of the patch, as `trainer.save_model()` or `mudjack patch` wrote it. It is
            only read.
        repo_id (`str`, *optional*): Repo to write to, made if it does not exist. With `create_pr` it defaults to the repo of
            the model that was patched.
        create_pr (`bool`, *optional*, defaults to `False`): Whether to open a pull request on an existing repo instead.
        private (`bool`, *optional*): Whether a new repo is private; defaults to what its owner has set.
        revision (`str`, *optional*, defaults to `"main"`): Branch, made if it does not exist; of a pull request, the branch
            that it is to be merged into.
        commit_message (`str`, *optional*): First line of the commit.
        token (`str`, *optional*): Token with write permission; defaults to the one that is logged in.
        base_model (`str`, *optional*): Hub id of the model that was patched, where it was loaded from a local copy.
        bug_instances (`Sequence[BugInstance or str or os.PathLike]`, *optional*): Reports, or their folders, to make public
            together with the triggers found in them: one for each report of the patch.
        metadata (`dict`, *optional*): Further metadata of the card, such as `tags`, `license` or `language`.
        blocking (`bool`, *optional*, defaults to `True`): Whether to wait. Otherwise the files are read as they are now,
            even if they are replaced or removed meanwhile.

    Returns:
        `CommitInfo`, with `commit_url` and, of a pull request, `pr_url`; or a `Future` of it.

    Raises:
        ValueError: If the folder holds no whole patch, or one of no steps or of an interrupted run, the repo holds something
            that is not one, or it is not known of which model the patch is.
        PushError: If the Hub could not be reached or refused. The message says why and how to try again.
    """
    folder = Path(folder)
    files = published_files(folder)
    record = read_record(folder) or {}
    if create_pr and record.get("kind") == "delta":
        raise ValueError(
            f"`{folder}` holds a delta, which is no model: a pull request would leave its repo without one. Make the patched model "
            "(`mudjack apply`) and propose that, or push the delta to a repo of its own."
        )
    if record.get("steps") == 0:
        raise ValueError(
            f"`{folder}` holds a model that was saved before any step of training: no patch. Train it first."
        )
    if record.get("unfinished"):
        raise ValueError(
            f"`{folder}` holds what a run had made when it was interrupted, before its locality budget was checked: nobody knows "
            "what it does to clean inputs. Resume the run, then push."
        )
    base_model = base_model or base_on_hub(record) or (repo_id if create_pr else None)
    if repo_id is None and not (create_pr and base_model):
        raise ValueError(
            "There is no `repo_id` to push to."
            if not create_pr
            else f"The patch in `{folder}` does not say of which repo its model is: it was loaded from "
            f"`{record.get('base_model')}`. Say it with `base_model` (`--base-model org/name`)."
        )
    if is_adapter(folder) and base_model is None:
        raise ValueError(
            f"The adapter in `{folder}` is for a model that was loaded from a folder, so nobody else could load it. Say "
            "which model on the Hub that is: `base_model` (`--base-model org/name`)."
        )
    repo_id = repo_id or base_model
    shared = _shared_files(folder, bug_instances)
    again = _again(
        folder, repo_id, create_pr, private, revision, commit_message, base_model, bug_instances, metadata or {}
    )
    then = f"The patch in `{folder}` is whole. To try again: {again}"
    api = _api(token)
    with ExitStack() as opened, explained(repo_id, then):
        if create_pr:
            info = api.model_info(repo_id, revision=revision)
        else:
            info = open_repo(repo_id, base_model, private=private, revision=revision, token=token)
        repo_id = info.id
        # Open files stay what they are, even if they are replaced or removed. Of paths, Xet sends only what is new
        contents: dict[str, str | bytes | BinaryIO] = {
            name: str(path) if blocking else opened.enter_context(path.open("rb")) for name, path in files.items()
        }
        contents |= {**shared, RECORD_FILE: _as_json(published_record(folder, base_model))}
        if is_adapter(folder):
            contents[ADAPTER_CONFIG] = _adapter_config(folder, base_model)
        others = {sibling.rfilename for sibling in info.siblings or []} - contents.keys() - {CARD_FILE}
        stale = _stale(others, is_adapter(folder), create_pr)
        card = patch_card(
            folder,
            repo_id,
            base_model=base_model,
            earlier=_earlier_card(api, info, folder),
            metadata=metadata,
            base_metadata={} if base_model in (None, repo_id) else _metadata_of(api, base_model),
            unrepaired=[] if is_adapter(folder) else _unrepaired(repo_id, others - stale),
            shared=bool(shared),
        )
        contents[CARD_FILE] = card.encode()
        operations = [
            *(CommitOperationAdd(name, content) for name, content in contents.items()),
            *(CommitOperationDelete(name) for name in sorted(stale)),
        ]
        left = opened.pop_all()

    def commit() -> CommitInfo:
        with left, explained(repo_id, then):
            return api.create_commit(
                repo_id,
                operations,
                commit_message=commit_message or "Repair a backdoor with hf-mudjacking",
                revision=revision,
                create_pr=create_pr,
                # What was read of the repo is what is written on
                parent_commit=info.sha,
            )

    return commit() if blocking else _BACKGROUND.submit(commit)


def open_repo(
    repo_id: str,
    base_model: str | None,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
) -> ModelInfo:
    """Make a repo, and a branch of it, where they do not exist; refuse one that holds anything else than such a patch.

    Args:
        repo_id (`str`): Repo to write to.
        base_model (`str`, *optional*): Hub id of the model that is patched; `None` if the Hub does not know it.
        private (`bool`, *optional*): Whether a new repo is private.
        revision (`str`, *optional*): Branch.
        token (`str`, *optional*): Token with write permission.

    Returns:
        `ModelInfo`: Of the repo as it is.

    Raises:
        ValueError: If the repo holds weights but no record, or a patch of another model.
    """
    api = _api(token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not revision.startswith("refs/"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    info = api.model_info(repo_id, revision=revision)
    there = {sibling.rfilename for sibling in info.siblings or []}
    if any(name.endswith(_WEIGHT_SUFFIXES) for name in there):
        of = _patched_model(_read(api, info, RECORD_FILE)) if RECORD_FILE in there else None
        if of is None or (of and base_model and of != base_model):
            what = "a model that hf-mudjacking did not write" if of is None else f"a patch of `{of}`"
            raise ValueError(
                f"`{repo_id}` holds {what}. Choose a new repo, or propose the patch as a pull request (`create_pr=True`, "
                "`--create-pr`): nothing foreign is overwritten."
            )
    return info


def _api(token: str | None) -> HfApi:
    return HfApi(token=token, library_name="hf-mudjacking", library_version=__version__)


def _read(api: HfApi, info: ModelInfo, name: str) -> str:
    url = hf_hub_url(info.id, name, revision=info.sha, endpoint=api.endpoint)
    response = get_session().get(url, headers=build_hf_headers(token=api.token), follow_redirects=True)
    hf_raise_for_status(response)
    return response.text


def _patched_model(record: str) -> str | None:
    """The base model of a published record; `""` if the Hub does not know it, `None` if this is no record."""
    try:
        return json.loads(record)["base_model"]
    except (ValueError, KeyError, TypeError):
        return None


def _earlier_card(api: HfApi, info: ModelInfo, folder: Path) -> str | None:
    """The card of the repo; where it has none, the one in the folder."""
    if any(sibling.rfilename == CARD_FILE for sibling in info.siblings or []):
        return _read(api, info, CARD_FILE)
    local = inside(folder, CARD_FILE)
    return local.read_text(encoding="utf-8") if local.is_file() else None


def _metadata_of(api: HfApi, base_model: str) -> dict[str, Any]:
    """What the base model says of itself that holds for the patch too; nothing if it cannot be seen."""
    try:
        info = api.model_info(base_model)
    except HfHubHTTPError as error:
        logger.info(f"Licence and pipeline tag of `{base_model}` are not known ({error}).")
        return {}
    card = info.card_data.to_dict() if info.card_data else {}
    return {
        **{key: card.get(key) for key in _BASE_METADATA},
        "pipeline_tag": info.pipeline_tag,
        "library_name": info.library_name,
    }


def _stale(others: set[str], adapter: bool, create_pr: bool) -> set[str]:
    """Files of an earlier patch, or of the base, that would be loaded instead of this one or say what no longer holds."""
    patterns = [*ADAPTER_FILES, *DELTA_FILES]
    if not (adapter and create_pr):
        patterns += FULL_WEIGHTS
    stale = {name for name in others for pattern in patterns if "/" not in name and fnmatch.fnmatchcase(name, pattern)}
    if not create_pr:
        stale |= {name for name in others if name.startswith((f"{BUG_FOLDER}/", f"{SHARED_TRIGGER_FOLDER}/"))}
    return stale


def _unrepaired(repo_id: str, others: set[str]) -> list[str]:
    """Files that hold the backdoored weights in another format. Whether they go is for the owner of the repo to say."""
    found = sorted(name for name in others if name.endswith(_WEIGHT_SUFFIXES))
    if found:
        logger.warning(
            f"These files of `{repo_id}` still hold the weights from before the repair: {', '.join(found)}. Remove them, or "
            "convert the repaired weights again."
        )
    return found


def _shared_files(
    folder: Path, bug_instances: Sequence[BugInstance | str | os.PathLike[str]]
) -> dict[str, str | bytes | BinaryIO]:
    """Reports and triggers as they are saved, by their path in the repo."""
    if not bug_instances:
        return {}
    count = len((read_record(folder) or {}).get("triggers", []))
    if len(bug_instances) != count:
        raise ValueError(
            f"The patch in `{folder}` repairs {count} reports, but {len(bug_instances)} were given to be shared. Give each."
        )
    with tempfile.TemporaryDirectory() as place:
        for i, bug in enumerate(bug_instances):
            bug = bug if isinstance(bug, BugInstance) else BugInstance.load(bug)
            bug.save(Path(place) / BUG_FOLDER / str(i))
            found = inside(folder, f"{TRIGGER_FOLDER}/{i}")
            for path in sorted(check_folder(found).iterdir()) if found.is_dir() else []:
                (Path(place) / SHARED_TRIGGER_FOLDER / str(i)).mkdir(parents=True, exist_ok=True)
                (Path(place) / SHARED_TRIGGER_FOLDER / str(i) / path.name).write_bytes(path.read_bytes())
        files = sorted(path for path in Path(place).rglob("*") if path.is_file())
        return {path.relative_to(place).as_posix(): path.read_bytes() for path in files}


def _adapter_config(folder: Path, base_model: str) -> bytes:
    """An adapter's configuration, which names its model by the Hub id instead of a local path."""
    config = read_json(folder / ADAPTER_CONFIG)
    return _as_json({**config, "base_model_name_or_path": base_model})


def _as_json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()


def _again(
    folder: Path,
    repo_id: str,
    create_pr: bool,
    private: bool | None,
    revision: str | None,
    commit_message: str | None,
    base_model: str | None,
    bug_instances: Sequence[BugInstance | str | os.PathLike[str]],
    metadata: dict[str, Any],
) -> str:
    """What does the same once more."""
    # What the command line has no option for
    if any(isinstance(bug, BugInstance) for bug in bug_instances) or metadata.keys() - {"tags"}:
        return "call `push_to_hub` again with the same arguments."
    tags = metadata.get("tags")
    given = {
        "--repo-id": [repo_id],
        "--create-pr": create_pr,
        "--private": private,
        "--revision": [revision] if revision else [],
        "--tags": [tags] if isinstance(tags, str) else tags or [],
        "--commit-message": [commit_message] if commit_message else [],
        "--base-model": [base_model] if base_model else [],
        "--share-bug-instances": map(str, bug_instances),
    }
    words = ["mudjack", "push", str(folder)]
    for option, values in given.items():
        if isinstance(values, bool | None):
            words += [option] * bool(values)
        else:
            words += [word for value in values for word in (option, value)]
    return f"`{shlex.join(words)}`"
