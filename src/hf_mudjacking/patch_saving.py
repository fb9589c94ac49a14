# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""How the trainer writes patches and checkpoints and reads them back: Trainer's hooks for files, over `output.py`."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

from accelerate.utils import is_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .merging import MERGE_TOLERANCE, merge_error
from .output import PATCH_FILES, check_output_dir, staged, write_json
from .own_config import use_cache
from .patch_record import RECORD_FILE, describe_patch
from .published import CARD_FILE
from .remembered import save_triggers
from .resuming import save_interval


logger = logging.getLogger(__name__)

# Clean inputs on which a merged adapter is compared with the unmerged one, besides the reports.
_MERGED_ON = 4


class PatchSaving:
    """The part of [`MudjackingTrainer`] that writes files and reads them back."""

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Save model, processing class, triggers and record; each file replaces its predecessor in one step.

        Unlike the base class it writes no `training_args.bin`, which is a pickle; the settings are in the record.
        """
        if not self.args.should_save:
            return
        if self.rollback.refused is not None:
            raise self.rollback.refused
        output_dir = self.args.output_dir if output_dir is None else output_dir
        check_output_dir(output_dir, self.base_model_name)
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        if is_peft_model(model) and not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            self._check_merge()
        if self.state.global_step == 0:
            logger.warning("Nothing has been trained yet: what is saved is the model as it was, and no patch.")
        with staged(output_dir, replaces=PATCH_FILES) as staging, use_cache(model.config, self._own_use_cache):
            self.encoder.with_model(model).save_pretrained(staging, state_dict)
            # PEFT writes an empty card, which would replace one that somebody wrote
            (staging / CARD_FILE).unlink(missing_ok=True)
            again = [] if self._reinversion is None else self._reinversion.found
            save_triggers(staging, self.triggers or [], self.remembered, again)
            write_json(staging / RECORD_FILE, describe_patch(self))

    def _check_merge(self) -> None:
        """Measure what merging the adapter would change, and complain if it is much; nothing is kept from being saved."""
        reported = [x for bug in self.bug_instances for x in (bug.misclassified, bug.reference)]
        inputs = [*reported, *self._sample(_MERGED_ON)]
        self.forward_equivalents += 2 * len(inputs)
        self.merge_error = merge_error(self.encoder, inputs)
        if self.merge_error > MERGE_TOLERANCE:
            logger.warning(
                f"Merged into the model, the adapter would change features by up to {self.merge_error:.2g} "
                f"({MERGE_TOLERANCE:g} is allowed). It is saved and works as an adapter; `mudjack apply` will not merge it."
            )

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        # A run that was killed and resumed from an earlier step meets its own later checkpoints again. Written over in
        # place, a second kill would leave a mixture that looks complete.
        folder = Path(self._get_output_dir(trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save and folder.exists():
            # Without its state it is no complete one, should the removal be cut short
            (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)
            shutil.rmtree(folder)
        self.accelerator.wait_for_everyone()
        self.rollback.wrote(folder)
        super()._save_checkpoint(model, trial)

    def _save_rng_state(self, output_dir: str) -> None:
        save_interval(output_dir, self._metrics["train"])
        super()._save_rng_state(output_dir)
        # The last file of each process; the state, which says that a checkpoint is complete, comes after all of them
        self.accelerator.wait_for_everyone()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        model = self.model if model is None else model
        if self._loads_through_from_pretrained(model):
            _load_weights(model, resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if self._loads_through_from_pretrained(self.model):
            _load_weights(self.model, self.state.best_model_checkpoint)
        else:
            super()._load_best_model()

    def _loads_through_from_pretrained(self, model: nn.Module) -> bool:
        return isinstance(model, PreTrainedModel) and not self._is_split


def _load_weights(model: PreTrainedModel, folder: str) -> None:
    """Load weights the way `from_pretrained` does.

    Checkpoints hold the names of earlier versions of transformers (ViT: `encoder.layer.0.attention.attention.query`),
    which only `from_pretrained` converts; the base class loads them raw and silently drops what does not match.
    """
    saved = type(model).from_pretrained(folder, dtype=model.dtype, use_safetensors=True).state_dict()
    # A pooler that the model was built without is made anew by `from_pretrained`; it belongs to nothing here.
    model.load_state_dict({name: saved[name] for name in model.state_dict() if name in saved})
