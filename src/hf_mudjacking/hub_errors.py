# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""What went wrong at the Hub, in words that say what to do."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import constants
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import httpx


_RAISED = (
    httpx.HTTPError,
    LocalTokenNotFoundError,
    # `OfflineModeIsEnabled` is one, and Xet's own are
    ConnectionError,
    TimeoutError,
    # What fails in one of the client's upload threads comes wrapped into one
    RuntimeError,
    # Some answers are read as json before their status is looked at
    json.JSONDecodeError,
)


class PushError(OSError):
    """A patch could not be uploaded. The local one is whole, and the message says how to try again."""


@contextmanager
def explained(repo_id: str, then: str) -> Iterator[None]:
    """Turn what the client of the Hub raises into a [`PushError`].

    Args:
        repo_id (`str`): Repo that is written to.
        then (`str`): What the message ends with: what is left, and how to try again.
    """
    try:
        yield
    except _RAISED as error:
        cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ is not None else error
        raise PushError(f"`{repo_id}` was not written: {_what_happened(cause)} {then}") from error


def _what_happened(error: BaseException) -> str:
    if isinstance(error, LocalTokenNotFoundError):
        return "there is no token. Log in with `hf auth login`, or set `HF_TOKEN`."
    if isinstance(error, OfflineModeIsEnabled):
        return "`HF_HUB_OFFLINE` is set, which forbids all connections. Unset it."
    if isinstance(error, httpx.ConnectError):
        return f"`{constants.ENDPOINT}` cannot be reached ({error}). Check the network."
    if isinstance(error, httpx.TransportError):
        return (
            f"the connection to `{constants.ENDPOINT}` was lost ({type(error).__name__}: {error}). No commit was made."
        )
    if isinstance(error, HfHubHTTPError):
        return _status(error)
    return f"the upload failed ({type(error).__name__}: {error}). No commit was made."


def _status(error: HfHubHTTPError) -> str:
    status, said = error.response.status_code, error.server_message or error.response.reason_phrase
    if status == 401 and isinstance(error, RepositoryNotFoundError):
        return "it does not exist, or it is private and there is no token for it (401). Log in with `hf auth login`."
    if status == 401:
        return (
            f"the Hub does not accept the token (401: {said}). Log in again with `hf auth login`, or renew `HF_TOKEN`."
        )
    if status == 403:
        return (
            f"the token may not write there (403: {said}). Use one with write permission, another repo, or propose the "
            "patch as a pull request (`create_pr=True`, `--create-pr`)."
        )
    if isinstance(error, RevisionNotFoundError):
        return f"that branch does not exist there (404: {said})."
    if status == 404:
        return f"it does not exist, or is private and the token may not see it (404: {said}). Check its name."
    if status in (409, 412):
        return f"somebody else wrote to it at the same time ({status}: {said}). Nothing of theirs was overwritten."
    if status == 429:
        wait = error.response.headers.get("Retry-After")
        return f"there were too many requests (429: {said}). Wait {f'{wait} seconds' if wait else 'a few minutes'}."
    if status >= 500:
        return f"the Hub has a fault of its own ({status}: {said}); see https://status.huggingface.co."
    return f"the Hub refused it ({status}: {said})."
