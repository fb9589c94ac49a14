# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""`mudjack push`."""

from __future__ import annotations

import argparse
import sys

from .options import Several, add_config, require


HELP = "Upload a patch to the Hub, into a repo of its own or as a pull request; the reports stay here."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="FOLDER", help="folder of the patch")
    parser.add_argument(
        "--repo-id",
        metavar="ORG/NAME",
        help="repo, made if it does not exist (default with --create-pr: the base model's)",
    )
    parser.add_argument("--create-pr", action="store_true", help="open a pull request on an existing repo")
    parser.add_argument("--private", action="store_true", help="make a new repo private")
    parser.add_argument("--revision", metavar="BRANCH", help="branch, made if it does not exist (default: main)")
    parser.add_argument("--tags", metavar="TAG", action=Several, help="further tag of the card; once for each")
    parser.add_argument("--commit-message", metavar="TEXT", help="first line of the commit")
    parser.add_argument(
        "--base-model", metavar="ORG/NAME", help="Hub id of the patched model, if it was loaded from a local copy"
    )
    parser.add_argument(
        "--share-bug-instances",
        metavar="FOLDER",
        action=Several,
        help="make a report public, inputs and trigger: its bug folder; once for each report of the patch",
    )
    add_config(parser)


def run(options: argparse.Namespace) -> int:
    if not options.create_pr:
        require(options, "repo_id")
    from rich.console import Console

    from ..hub import push_patch
    from ..hub_errors import PushError

    try:
        commit = push_patch(
            options.folder,
            options.repo_id,
            create_pr=options.create_pr,
            # Without the option, what the owner of the repo has set as default
            private=options.private or None,
            revision=options.revision,
            commit_message=options.commit_message,
            base_model=options.base_model,
            bug_instances=options.share_bug_instances or (),
            metadata={"tags": options.tags},
        )
    except PushError as error:
        sys.stderr.write(f"mudjack push: error: {error}\n")
        return 4
    Console(highlight=False, soft_wrap=True).print(f"Pushed: {commit.pr_url or commit.commit_url}")
    return 0
