# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""What the trainer does once, while the model is still unpatched: triggers found, frozen features stored, batches and callbacks set up."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from .adversarial_views import AUTOMATIC_LEVELS, AdversarialViews, is_all_in_one_place
from .callbacks import BeforeTrackersClose
from .data import PatchingCollator, PatchingDataset
from .inversion import check_disagreement
from .inversion.patch_search import COMPLETE
from .inversion.verification import share_of_way
from .kept_views import worth_keeping
from .latent import LatentStamps
from .locality_budget import LocalityGuard
from .preprocessing import RawInput
from .reinversion import Reinversion
from .remembered import CHECKED_ON, what_they_do
from .reports import invert_reports
from .same_trigger import COMPARED_ON, same_triggers
from .token_patch import tokens_to_patch
from .triggers import Trigger, WarpTrigger, with_altered


logger = logging.getLogger(__name__)

# Clean images on which reports are inverted anew.
_REINVERTED_ON = 128
# Share of a patch that may be there by its looks alone for it to count as known exactly: exact masks of CIFAR-10 have up to 0.58, those that
# took in content around a small square 0.75 to 0.81.
_MOST_GROWN = 0.6


class PreStep:
    """The part of [`MudjackingTrainer`] that finds the triggers and sets up what training needs, before the first step."""

    def invert_triggers(self) -> list[Trigger | None]:
        """Find the trigger in each report; `train()` runs this when it has not run.

        Processes share the work and get the same result; each must call it. Once training or evaluation has begun it gives the
        triggers that are stamped: in a model that is being patched they could no longer be found.

        Returns:
            `list[Trigger]`: One per bug instance, also kept as `trainer.triggers`; evidence in `trainer.inversions`. With
            `on_unverified="patch"`, `None` for a report without evidence, whose best candidate stays in `inversions`; with
            `"skip"`, such a report is no longer among `trainer.bug_instances`.

        Raises:
            ValueError: If a report's inputs already agree.
            UnverifiedTriggerError: If the verdict on any report or, with `on_unverified="skip"`, on all is another than
                `"trigger"`; never with `"patch"`. See [`~hf_mudjacking.screening.Screening`].
        """
        if self._prepared:
            return self.triggers
        started = time.perf_counter()
        found = invert_reports(self.encoder, self._reports, self._require_train_inputs(), self.args, self._silent)
        self.inversion_forwards, self.inversion_seconds = found.forwards, time.perf_counter() - started
        self.forward_equivalents += found.forwards
        self.screenings, self.skipped = found.screenings, found.skipped
        self.bug_instances = [bug for i, bug in enumerate(self._reports) if i not in self.skipped]
        self.inversions = [screening.found for screening in found.kept]
        self.evidence = [round(inversion.evidence, 4) for inversion in self.inversions]
        self.triggers = found.triggers
        return self.triggers

    def _prepare(self) -> None:
        """Find the triggers and store the frozen model's features, once, while the model is still unpatched."""
        if self._prepared:
            return
        if self.triggers is None:
            self.invert_triggers()
        images = self.encoder.modality == "image"
        prepared = {
            name: PatchingDataset(
                inputs,
                self.encoder,
                self.args.per_device_eval_batch_size,
                self._silent,
                keep_views=images and worth_keeping(self.args, len(inputs), name == "train_dataset"),
                num_workers=self.args.dataloader_num_workers,
            )
            for name, inputs in self._inputs.items()
        }
        with self.encoder.over_processes():
            self._prepare_batches(prepared)
        self._prepared = True

    def _prepare_batches(self, prepared: dict[str, PatchingDataset]) -> None:
        """Set up what goes into batches, and what watches over them, given the datasets with their frozen features."""
        references = self.encoder.encode([bug.reference for bug in self.bug_instances])
        misclassified = self.encoder.encode([bug.misclassified for bug in self.bug_instances])
        self._led_to = misclassified
        self.forward_equivalents += sum(len(dataset) for dataset in prepared.values()) + 2 * len(references)
        self.train_dataset = prepared.pop("train_dataset", None)
        if self.train_dataset is not None:
            for bug, x_b, x_r in zip(self.bug_instances, misclassified, references, strict=True):
                check_disagreement(bug, x_b, x_r, self.train_dataset.frozen_features @ x_b)
        if prepared:
            self.eval_dataset = (
                {name.removeprefix("eval_dataset_"): dataset for name, dataset in prepared.items()}
                if isinstance(self.eval_dataset, dict)
                else prepared["eval_dataset"]
            )
        self.trigger_groups = self._same_triggers()
        for group in self.trigger_groups:
            if len(group) > 1:
                names = ", ".join(f"`{self.bug_instances[i].name}`" for i in sorted(group))
                logger.info(f"The bug instances {names} share a trigger: {self.triggers[group[0]].describe()}.")
        if self.remembered:
            for earlier, cosine in zip(self.remembered, self._earlier_repairs(), strict=True):
                earlier.cosine_before = cosine
        stamps: list[Trigger | None] = [self.triggers[group[0]] for group in self.trigger_groups]
        stamps += [e.trigger for e in self.remembered if e.trigger.modality == self.encoder.modality]
        self._latent = self._latent_stamps(len(stamps))
        if self._latent is not None:
            # Rows that carry nothing which could be seen in a picture
            stamps += [None] * self.triggers.count(None)
        self.data_collator = PatchingCollator(
            self.encoder.preprocessor,
            self.bug_instances,
            self.triggers,
            references,
            self._ceilings(misclassified, references),
            [[None] if e is None else with_altered(e, self.args.altered_triggers, self.args.seed) for e in stamps],
        )
        self._reinversion = self._looking_again(stamps, misclassified)
        self._adversarial = self._adversarial_views(stamps, misclassified)
        self.patched_tokens = tokens_to_patch(
            self.encoder, self.triggers, [bug.misclassified for bug in self.bug_instances], self.args.patch_scope
        )
        self._guard = self._locality_guard(misclassified)
        if self.train_dataset is not None:
            for i in self._of_one_class():
                self.train_dataset.lean_towards(references[i], self.args.inputs_per_step)

    def verdicts(self) -> list[dict[str, Any]]:
        """Records of the verdicts on the bug instances, now or before a resume; empty if their triggers were given."""
        records = [screening.record() for screening in self.screenings] or self.earlier_screenings
        return [record for i, record in enumerate(records) if i not in self.skipped]

    def _records(self) -> dict[int, dict[str, Any]]:
        """The verdicts by the numbers of the bug instances that have a trigger that was found."""
        return {i: record for i, record in enumerate(self.verdicts()) if self.triggers[i] is not None}

    def _of_one_class(self) -> list[int]:
        """Numbers of the bug instances whose trigger was verified only on inputs that resemble x_r."""
        return [i for i, record in self._records().items() if record.get("one_class")]

    def _latent_stamps(self, stamps: int) -> LatentStamps | None:
        """What rows carry for reports without a trigger, beside a number of stamps; `None` if they carry nothing."""
        without = [bug for bug, trigger in zip(self.bug_instances, self.triggers, strict=True) if trigger is None]
        if self.encoder.modality != "image" or not without or self.train_dataset is None:
            return None
        if not self.args.latent_strength or not self.args.generalizability_weight:
            return None
        if self._is_split or self.args.n_gpu > 1 or self.args.torch_compile:
            logger.warning(
                "`latent_strength` is ignored: hidden states cannot be reached under FSDP, DeepSpeed, DataParallel or "
                "`torch_compile`."
            )
            return None
        try:
            return LatentStamps(
                self.encoder,
                [*[None] * stamps, *without],
                self.args.latent_strength,
                self._spend_in_all,
            )
        except ValueError as error:
            logger.warning(f"`latent_strength` is ignored: {error}")
            return None

    def _adversarial_views(self, stamps: Sequence[Trigger | None], misclassified: Tensor) -> AdversarialViews | None:
        """What moves stamped pictures towards where their reports led; `None` if nothing does."""
        if self.encoder.modality != "image" or self.args.adversarial_levels == 0 or self.train_dataset is None:
            return None
        automatic = self.args.adversarial_levels is None
        known = {
            number
            for number, group in enumerate(self.trigger_groups)
            if automatic and self._is_known_exactly(group[0])
        }
        again = self._reinversion
        nothing_to_move = again is None and len(known) == len(self.trigger_groups)
        if nothing_to_move or not self.args.generalizability_weight:
            return None
        if self._is_split:
            logger.warning(
                "`adversarial_levels` is ignored under FSDP and DeepSpeed: no process has all weights there."
            )
            return None

        def target_of(number: int) -> Tensor | None:
            # Earlier triggers and rows that carry nothing follow those of the reports
            if number >= len(self.trigger_groups):
                return None
            # Until more of it is found than that
            stays = number in known and not (again is not None and again.found_more(number))
            return None if stays else misclassified[self.trigger_groups[number][0]]

        try:
            return AdversarialViews(
                self.encoder,
                len(stamps),
                target_of,
                lambda number: isinstance(stamps[number], WarpTrigger),
                AUTOMATIC_LEVELS if automatic else self.args.adversarial_levels,
                self.bug_instances[0].misclassified.size,
                self._spend_in_all,
            )
        except ValueError as error:
            logger.warning(f"`adversarial_levels` is ignored: {error}")
            return None

    def _is_known_exactly(self, number: int) -> bool:
        """Whether the trigger that was found in a report is the attacker's own, and works on all inputs."""
        trigger, record = self.triggers[number], self._records().get(number, {})
        exact = not record.get("one_class") and record.get("grown", 0.0) <= _MOST_GROWN * trigger.area
        return exact and is_all_in_one_place(trigger)

    def _looking_again(self, stamps: list[Trigger | None], misclassified: Tensor) -> Reinversion | None:
        """What inverts the reports anew while patching goes on; `None` if nothing does."""
        if self.encoder.modality != "image" or not self.args.reinversions or self.train_dataset is None:
            return None
        if not self.trigger_groups:
            return None
        if self._is_split:
            logger.warning("`reinversions` are left out under FSDP and DeepSpeed: no process has all weights there.")
            return None
        firsts = [group[0] for group in self.trigger_groups]
        again = Reinversion(
            self.encoder,
            self.train_dataset,
            stamps,
            [self.bug_instances[i] for i in firsts],
            misclassified[firsts],
            self._sample(_REINVERTED_ON),
            self.args.seed,
            self._spend,
        )
        self.add_callback(again)
        return again

    def _locality_guard(self, misclassified: Tensor) -> LocalityGuard | None:
        """What watches over the locality budget; `None` if there is none, or no training data."""
        if self.args.locality_budget is None or self.train_dataset is None:
            return None
        if self._is_split:
            logger.warning("`locality_budget` is not kept under FSDP and DeepSpeed: no process has all weights there.")
            return None
        held_out = self.train_dataset if self.eval_dataset in (None, {}) else self.eval_dataset
        guard = LocalityGuard(
            self.encoder,
            list(held_out.values()) if isinstance(held_out, dict) else [held_out],
            self.bug_instances,
            misclassified,
            self.args,
            self._spend,
        )
        self.add_callback(guard)
        # First of all callbacks: what it logs must reach the trackers before they close
        self.callback_handler.callbacks.insert(0, BeforeTrackersClose(self._check_locality))
        return guard

    def _same_triggers(self) -> list[list[int]]:
        """Numbers of the bug instances that share a trigger; see [`same_triggers`]."""
        known, inputs = len(self.triggers) - self.triggers.count(None), self._sample(COMPARED_ON)
        self.forward_equivalents += len(inputs) * (1 + known) * (known > 1)
        return same_triggers(self.encoder, self.triggers, inputs)

    def _earlier_repairs(self) -> list[float | None]:
        """What the remembered triggers do to the model as it is; see [`what_they_do`]."""
        inputs = self._sample(CHECKED_ON)
        self.forward_equivalents += len(inputs) * (1 + len(self.remembered))
        with nullcontext() if self._is_split else self.encoder.over_processes():
            return what_they_do(self.encoder, self.remembered, inputs)

    def _sample(self, count: int) -> Sequence[RawInput]:
        """Clean inputs of the first dataset that there is, or the references; the same at each call."""
        references = [bug.reference for bug in self.bug_instances]
        return next((inputs.sample(count, self.args.seed) for inputs in self._inputs.values()), references)

    def _ceilings(self, misclassified: Tensor, references: Tensor) -> Tensor:
        """How near to its reference each misclassified input comes without its trigger; 1 where that cannot be told.

        It cannot where what was found is not all of the trigger: without it the input is then still misclassified.
        """
        ceilings = torch.ones(len(references))
        for i, (bug, trigger) in enumerate(zip(self.bug_instances, self.triggers, strict=True)):
            rest = None if trigger is None else trigger.removed_from(bug.misclassified)
            if rest is not None:
                feature = self.encoder.encode([rest])[0]
                self._spend(1)
                before, after = (x @ misclassified[i] for x in (references[i], feature))
                if share_of_way(before[None], after[None, None]) <= COMPLETE:
                    ceilings[i] = feature @ references[i]
        return ceilings
