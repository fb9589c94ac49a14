# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""How the trainer uploads what it has saved: Trainer's hooks for the Hub, over `hub.py`."""

from __future__ import annotations

import logging
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo
from transformers.trainer_utils import HubStrategy

from .hub import open_repo, push_patch
from .hub_errors import PushError, explained
from .model_card import card_metadata, patch_card
from .output import staged
from .patch_record import read_record
from .published import CARD_FILE, base_on_hub


logger = logging.getLogger(__name__)


class PatchPushing:
    """The part of [`MudjackingTrainer`] that talks to the Hub."""

    # Of a checkpoint, which nobody waits for
    _upload: Future[CommitInfo] | None = None

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        *,
        create_pr: bool = False,
        base_model: str | None = None,
        share_bug_instances: bool = False,
        **kwargs: Any,
    ) -> CommitInfo | Future[CommitInfo] | None:
        """Save the patch and upload it in one commit; see [`~hf_mudjacking.hub.push_patch`] for what is uploaded.

        Args:
            commit_message (`str`, *optional*, defaults to `"End of training"`): First line of the commit.
            blocking (`bool`, *optional*, defaults to `True`): Whether to wait for the upload.
            token (`str`, *optional*): Token with write permission; defaults to `args.hub_token`, then to the one logged in.
            revision (`str`, *optional*): Branch; defaults to `args.hub_revision`, then to `"main"`.
            private (`bool`, *optional*): Whether a new repo is private; defaults to `args.hub_private_repo`.
            create_pr (`bool`, *optional*, defaults to `False`): Whether to open a pull request on the repo of the model that
                was patched, instead of writing to `args.hub_model_id`.
            base_model (`str`, *optional*): Hub id of the model that was patched, if it was loaded from a local copy.
            share_bug_instances (`bool`, *optional*, defaults to `False`): Whether to make reports and triggers public. Without
                it nothing that was reported leaves the machine.
            kwargs: For [`~MudjackingTrainer.create_model_card`]: `tags`, `license`, `language`, ...

        Returns:
            `CommitInfo`, or a `Future` of it if not `blocking`; `None` in all processes but the first.

        Raises:
            LocalityBudgetError: If training was rolled back: there is no patch.
            ValueError: If nothing has been trained, or training was interrupted and its locality budget was not checked.
            PushError: If the Hub could not be reached or refused; the patch is saved in `args.output_dir` all the same.
        """
        if self.rollback.refused is not None:
            raise self.rollback.refused
        if self.state.global_step == 0:
            raise ValueError(
                "Nothing has been trained yet, so there is no patch to upload. Call `trainer.train()` first."
            )
        if self.rollback.unjudged:
            raise ValueError(
                "Training was interrupted before its locality budget was checked, so nobody knows what the patch does to clean "
                "inputs. Finish it with `trainer.train()`, or `resume_from_checkpoint`."
            )
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self._finish_current_push()
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        # Trainer's own name for it
        finetuned_from = kwargs.pop("finetuned_from", None)
        base_model = base_model or finetuned_from
        self.create_model_card(finetuned_from=base_model, **kwargs)
        kwargs.pop("model_name", None)
        return push_patch(
            self.args.output_dir,
            None if create_pr else self._hub_name,
            create_pr=create_pr,
            private=self.args.hub_private_repo if private is None else private,
            revision=revision or self.args.hub_revision,
            commit_message=commit_message,
            token=token or self.args.hub_token,
            base_model=base_model,
            bug_instances=self.bug_instances if share_bug_instances else (),
            metadata=card_metadata(**kwargs),
            blocking=blocking,
        )

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
    ) -> None:
        """Write the card of the patch that is saved in `args.output_dir`; see [`~hf_mudjacking.model_card.patch_card`].

        Args:
            language (`str`, *optional*): Language of the model.
            license (`str`, *optional*): Its licence.
            tags (`str` or `list[str]`, *optional*): Further tags.
            model_name (`str`, *optional*): Title of a new card; defaults to the name of the repo.
            finetuned_from (`str`, *optional*): Hub id of the model that was patched, if it was loaded from a local copy.
            tasks (`str` or `list[str]`, *optional*): Pipeline tag; of several, the first.
            dataset_tags (`str` or `list[str]`, *optional*): Hub ids of the clean inputs.
            dataset (`str` or `list[str]`, *optional*): Unused: the card names no local data.
            dataset_args (`str` or `list[str]`, *optional*): Unused, as before.

        Raises:
            ValueError: If no patch has been saved there.
        """
        if not self.is_world_process_zero():
            return
        card_file = Path(self.args.output_dir) / CARD_FILE
        if read_record(self.args.output_dir) is None:
            raise ValueError(f"`{self.args.output_dir}` holds no patch yet. Call `trainer.save_model()` first.")
        card = patch_card(
            self.args.output_dir,
            model_name or self._hub_name,
            base_model=finetuned_from or base_on_hub(read_record(self.args.output_dir) or {}),
            earlier=card_file.read_text(encoding="utf-8") if card_file.is_file() else None,
            metadata=card_metadata(language, license, tags, tasks, dataset_tags),
        )
        with staged(self.args.output_dir) as staging:
            (staging / CARD_FILE).write_text(card, encoding="utf-8")

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Make the repo before training, so that one that cannot be written to, or holds another model, is known in time.

        Args:
            token (`str`, *optional*): Token with write permission; defaults to `args.hub_token`.
            private (`bool`, *optional*): Whether a new repo is private; defaults to `args.hub_private_repo`.

        Raises:
            ValueError: If the repo holds a model that hf-mudjacking did not write, or a patch of another one.
            PushError: If the Hub could not be reached or refused.
        """
        if not self.is_world_process_zero():
            return
        then = "Nothing was trained. Start again, or train without `push_to_hub=True` and upload with `mudjack push`."
        with explained(self._hub_name, then):
            self.hub_model_id = open_repo(
                self._hub_name,
                base_on_hub({"base_model": self.base_model_name, "base_revision": self.base_revision}),
                private=self.args.hub_private_repo if private is None else private,
                revision=self.args.hub_revision,
                token=token or self.args.hub_token,
            ).id

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # What may still be rolled back is not uploaded
        if self._guard is not None or self.args.hub_strategy == HubStrategy.END or not self.is_world_process_zero():
            return
        if self._upload is not None and not self._upload.done() and not self.args.hub_always_push:
            return
        self._finish_current_push()
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        try:
            self._upload = push_patch(
                checkpoint_folder,
                self._hub_name,
                revision=self.args.hub_revision,
                commit_message=f"Training in progress, step {self.state.global_step}",
                token=self.args.hub_token,
                blocking=False,
            )
        except PushError as error:
            logger.warning(f"Training goes on. {error}")

    def _finish_current_push(self) -> None:
        if self._upload is not None and self._upload.exception() is not None:
            logger.warning(f"A checkpoint was not uploaded. {self._upload.exception()}")
        self._upload = None

    @property
    def _hub_name(self) -> str:
        """The repo as the Hub calls it, or as it was asked for, or as the folder is called."""
        return self.hub_model_id or self.args.hub_model_id or Path(self.args.output_dir).absolute().name
