# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""`MudjackingTrainer`: the Hugging Face Trainer with the three losses of Mudjacking and a trigger-inversion pre-step."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import cached_property
from typing import Any

import datasets
import torch
from peft import PeftConfig
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer, TrainerCallback, set_seed
from transformers.trainer_utils import (
    EvalLoopOutput,
    HubStrategy,
    PredictionOutput,
    TrainOutput,
)

from .adapters import add_adapter, check_adapters, check_start
from .adversarial_views import AdversarialViews
from .bug_instance import BugInstance
from .callbacks import StopWhenFixed
from .clean_inputs import CleanInputs, clean_inputs
from .config import MudjackingConfig
from .data import PatchingDataset
from .encoder import Encoder, NonFiniteError
from .fingerprint import base_name, clean_inputs_sha256, weights_sha256
from .inversion import InvertedTrigger
from .inversion.verification import TransferMeter
from .latent import LatentStamps
from .loading import has_two_towers, hub_commit, load_model, load_processor, modality_of, parts_left_out
from .locality_budget import LocalityBudgetError, LocalityGuard, Movement, diverged
from .losses import effectiveness_loss, generalizability_loss, locality_loss, mean_cosine, mudjacking_loss
from .modes import evaluated_afterwards, frozen, norm_parameters, set_comparison_mode
from .output import check_output_dir
from .own_config import own_special_tokens, use_cache
from .patch_pushing import PatchPushing
from .patch_record import read_record, recorded_settings
from .patch_saving import PatchSaving
from .pre_step import PreStep
from .reinversion import Reinversion
from .remains import Remains, remains
from .remembered import (
    RememberedTrigger,
    load_again,
    load_remembered,
    load_reported_triggers,
    report_earlier_repairs,
)
from .reports import checked_reports, checked_triggers
from .resuming import check_same_run, checkpoint_to_resume, load_interval, where_it_was
from .rollback import Rollback
from .screening import Screening
from .token_patch import neutralise_unseen, only_embeddings_of
from .triggers import Trigger


logger = logging.getLogger(__name__)

# Clean texts that are searched for the triggers' tokens.
_TOKEN_COUNT_INPUTS = 2000

_METRICS = (
    "loss_effectiveness",
    "loss_locality",
    "loss_generalizability",
    "cosine_effectiveness",
    "cosine_locality",
    "cosine_generalizability",
)


class MudjackingTrainer(PreStep, PatchPushing, PatchSaving, Trainer):
    """Repairs a backdoored encoder from bug reports.

    `train()` first finds the trigger in each report (unless `triggers` are given), then trains the encoder until the
    trigger does nothing and all other features are as they were. One step is one forward pass over x, x ⊕ e and the
    report; features of the frozen model are computed once, and no second model stays in memory.

    Args:
        model (`str`, `os.PathLike`, [`~transformers.PreTrainedModel`] or `PeftModel`): Backdoored vision or text
            encoder: Hub id, local folder, or model. Loaded in float32; a model object is patched in place. Of two
            towers (CLIP, SigLIP) the one that the reports are for is patched, in the space that both share.
        args ([`MudjackingConfig`], *optional*): Configuration; by default one with `output_dir="patched"`.
        bug_instances (`list[BugInstance]`): One or many reports.
        train_dataset (`datasets.Dataset` or `datasets.IterableDataset`): Clean, unlabelled inputs in a column
            `image` or `text`.
        eval_dataset (`datasets.Dataset`, `datasets.IterableDataset` or `dict`, *optional*): Held-out clean inputs.
        processing_class (`BaseImageProcessor`, `PreTrainedTokenizerBase`, `ProcessorMixin` or `str`, *optional*): Image
            processor, tokenizer or, for two towers, both in one, or its id or folder; loaded from the model's when absent.
        peft_config (`LoraConfig`, *optional*): Makes the patch an adapter. Without `target_modules`, all linear layers
            that influence the features are adapted.
        triggers (`list[Trigger]`, *optional*): Known triggers, one per report, instead of the inversion.
        callbacks (`list[TrainerCallback]`, *optional*): Further callbacks.
        optimizers (`tuple`, *optional*): Optimiser and scheduler instead of the configured ones.

    Attributes:
        base_revision (`str`): Commit of the Hub that the model was loaded from; `None` if it was a folder, or cannot be told.
        triggers (`list[Trigger]`): One per bug instance; `None` for one without (`on_unverified="patch"`).
        trigger_groups (`list[list[int]]`): Bug instances that share a trigger, known once training or evaluation began.
            The trigger of the first in a group is stamped for all of them.
        screenings (`list[Screening]`): The verdict on each report that was given, with its evidence.
        skipped (`list[int]`): Numbers of reports that were left out (`on_unverified="skip"`) among those that were given.
        remembered (`list[RememberedTrigger]`): Triggers that earlier patches of the model repaired.
        locality (`Movement`): How far clean features have moved, once training is over (`locality_budget`).
        rollback (`Rollback`): Whether the run was taken back, and why.
        base_weights_sha256 (`str`): Hash of the unpatched weights, by which the patch knows its model.
        base_weights_without (`list[str]`): Weights that it leaves out, because no feature depends on them: where a
            checkpoint lacks a pooler, each loading makes another one. Of a model of two towers nothing is left out.
        inversion_forwards, inversion_seconds (`int`, `float`): What it took to find the triggers: forward passes of all processes, and
            seconds; 0 if they were given or are those of a checkpoint.
        figures (`dict`): What was measured downstream, by task; it is saved with the patch.
        merge_error (`float`): Of an adapter, once saved: largest change of a feature's entry that merging makes.

    Raises:
        TypeError, ValueError: If model, processor, reports, data or output folder cannot be used; the message says
            what was given, what is needed, and what to do.

    Example:

    ```python
    >>> trainer = MudjackingTrainer(
    ...     model="org/model-id",
    ...     args=MudjackingConfig(output_dir="patched"),
    ...     bug_instances=[BugInstance(misclassified=x_b, reference=x_r)],
    ...     train_dataset=clean_inputs,
    ... )
    >>> trainer.train()
    >>> trainer.save_model()
    ```
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | PreTrainedModel | nn.Module,
        args: MudjackingConfig | None = None,
        bug_instances: list[BugInstance] | None = None,
        train_dataset: datasets.Dataset | datasets.IterableDataset | None = None,
        eval_dataset: datasets.Dataset | datasets.IterableDataset | dict[str, datasets.Dataset] | None = None,
        processing_class: Any = None,
        peft_config: PeftConfig | None = None,
        triggers: list[Trigger] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
    ) -> None:
        # Args
        if args is None:
            args = MudjackingConfig(output_dir="patched")
        if not isinstance(args, MudjackingConfig):
            raise TypeError(f"`args` is of type `{type(args).__name__}`; a `MudjackingConfig` is needed.")
        started = int(os.environ.get("WORLD_SIZE", "1"))
        if started > 1 and args.world_size == 1:
            raise ValueError(
                f"This is one of {started} processes, but it takes itself for the only one: all would write to "
                f"`{args.output_dir}`. Without a GPU pass `MudjackingConfig(use_cpu=True)`."
            )
        set_seed(args.seed)

        # Reports
        self._reports = checked_reports(bug_instances)
        self.bug_instances = self._reports
        self.skipped: list[int] = []

        # Model and processing class
        name, model = model, load_model(model)
        modality = modality_of(model, self.bug_instances[0].modality)
        if processing_class is None or isinstance(processing_class, (str, os.PathLike)):
            processing_class = load_processor(name if processing_class is None else processing_class, model)
        self.base_model_name = str(getattr(model, "name_or_path", "") or type(model).__name__)
        self.base_revision = hub_commit(self.base_model_name, newest=not isinstance(name, nn.Module))
        check_output_dir(args.output_dir, self.base_model_name)
        heads = parts_left_out(model)
        if heads:
            logger.warning(
                f"`{self.base_model_name}` has more than an encoder ({', '.join(f'`{head}`' for head in heads)}). The encoder is patched, and "
                "saved without: what reads its features is to be taken from there."
            )
        folder = self.base_model_name if isinstance(name, nn.Module) else name
        self.remembered: list[RememberedTrigger] = load_remembered(folder) if args.remember_triggers else []

        if args.patch_scope == "trigger_tokens" and modality != "text":
            raise ValueError(
                f'`patch_scope="trigger_tokens"` trains embeddings of tokens, and the model takes {modality}s. Use `"auto"` or '
                '`"full"`.'
            )
        if self.bug_instances[0].modality != modality:
            raise TypeError(
                f"Bug instance `{self.bug_instances[0].name}` is of kind {self.bug_instances[0].modality}, but the model "
                f"takes {modality}s."
            )
        self.triggers = None if triggers is None else checked_triggers(triggers, len(self.bug_instances), modality)
        self.inversions: list[InvertedTrigger] = []
        self.evidence: list[float] = []
        self.screenings: list[Screening] = []
        # As they stand in the record of the checkpoint that training goes on from
        self.earlier_screenings: list[dict[str, Any]] = []

        if args.push_to_hub and args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            raise ValueError(
                f"`hub_strategy={args.hub_strategy.value!r}` uploads checkpoints, which hold the inverted triggers: pixels of "
                "the reported inputs. Use `every_save` or `end`."
            )
        if any(p.is_floating_point() and p.dtype != torch.float32 for p in model.parameters()):
            logger.warning("The model is not in float32, in which it is patched. Use `bf16=True` for speed.")
            model.float()
        self.encoder = Encoder(model, processing_class, args.feature_source, modality)
        unused = self.encoder.unused_parameters()
        names = [base_name(model, name) for name in unused]
        self.base_weights_without = [] if has_two_towers(model) else sorted(name for name in names if name)
        self.base_weights_sha256 = weights_sha256(model, self.base_weights_without)
        self.inversion_forwards, self.inversion_seconds = 0, 0.0
        self.figures: dict[str, Any] = {}
        self.merge_error: float | None = None

        if has_two_towers(model) and args.n_gpu > 1:
            raise ValueError(
                f"`{type(model).__name__}` has two towers, which one process cannot spread over {args.n_gpu} GPUs. Start a "
                "process for each (`accelerate launch`), or show it one (`CUDA_VISIBLE_DEVICES=0`)."
            )

        if args.activation_checkpointing and not model.supports_gradient_checkpointing:
            # The base class would say so when the triggers have been found
            raise ValueError(
                f"`{type(model).__name__}` does not support `gradient_checkpointing` (`activation_checkpointing`). Leave it out; smaller "
                "batches need less memory too (`per_device_train_batch_size`, `gradient_accumulation_steps`)."
            )

        # PEFT
        check_adapters(model, self.base_model_name)
        if peft_config is not None:
            seen = [bug.reference for bug in self.bug_instances]
            before = self.encoder.encode(seen)
            model = add_adapter(model, peft_config, self.base_model_name, unused)
            self.encoder.model = model
            try:
                check_start(before, self.encoder.encode(seen), peft_config)
                unused = self.encoder.unused_parameters()
            except AttributeError as error:
                raise ValueError(
                    f"`{self.base_model_name}` does not run with this adapter ({error}): it reads something of a layer that an "
                    "adapter hides. Name other layers in `target_modules` of `peft_config`, or patch without an adapter."
                ) from error
        # Without a gradient DDP would stop and weight decay still change the unused ones: they rest while training goes on
        self._resting = [p for p in map(model.get_parameter, unused) if p.requires_grad]
        self._resting += [p for p in norm_parameters(model) if all(p is not other for other in self._resting)]
        resting = {id(parameter) for parameter in self._resting}
        trained = [p for p in model.parameters() if p.requires_grad and id(p) not in resting]
        if not trained:
            raise ValueError(
                "No parameter of the model is trainable, so nothing could be patched. Load an adapter with "
                "`PeftModel.from_pretrained(..., is_trainable=True)`, unfreeze the encoder, or pass `peft_config`."
            )

        if optimizers[0] is not None:
            held = {id(p) for group in optimizers[0].param_groups for p in group["params"]}
            if not any(id(p) in held for p in trained):
                raise ValueError(
                    "The optimizer in `optimizers` holds no parameter that is trained, so nothing would be patched. With `peft_config` "
                    "the adapter is made here: make it before (`get_peft_model`), and the optimizer of its parameters, and pass that model."
                )

        # Data: the frozen features are added when training or evaluation starts
        self._inputs = {} if train_dataset is None else {"train_dataset": self._clean(train_dataset, args)}
        for name, dataset in _named_eval_datasets(eval_dataset).items():
            self._inputs[name] = clean_inputs(modality, dataset, args.max_inputs, args.seed, name)

        # The base class sets it to `args.use_cache` for good; here it is that while training goes on, and what is saved says what
        # the model said
        self._own_use_cache = vars(model.config).get("use_cache")
        with use_cache(model.config, self._own_use_cache):
            super().__init__(
                model=model,
                args=args,
                train_dataset=self._inputs.get("train_dataset"),
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                callbacks=[StopWhenFixed(), *(callbacks or [])],
                optimizers=optimizers,
            )

        # The loss is a batch mean, so Trainer must divide it by the number of accumulation steps
        self.model_accepts_loss_kwargs = False
        self.loss_is_scaled_for_ga = False
        # There are no labels, yet a loss: without these two, evaluation would never call `compute_loss`
        self.can_return_loss = True
        self.label_names = []
        self._prepared = False
        # The step that a run goes on from, and whether it had stopped there of itself
        self._resumed = (0, False)
        self.trigger_groups: list[list[int]] = []
        self.locality: Movement | None = None
        self._guard: LocalityGuard | None = None
        self._reinversion: Reinversion | None = None
        self._adversarial: AdversarialViews | None = None
        # By how many levels pictures were moved before a resume
        self._moved_before: float | None = None
        self._latent: LatentStamps | None = None
        self.rollback = Rollback(args.output_dir)
        self._given_optimizers = optimizers
        # Whether tokens that no clean text has were set back, which the first steps of a run build on
        self._neutralised = False
        # Tokens whose embeddings are all that is patched; empty if it is the whole model
        self.patched_tokens: list[int] = []
        self._metrics: dict[str, list[tuple[int, Tensor]]] = {"train": [], "eval": []}
        # Inputs that went through the model so far, in all processes; a backward pass counts as two
        self.forward_equivalents = 0

    # ---- Training ----

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        # Which parameters it is for is known then
        self._prepare()
        optimizer = super().create_optimizer(*args, **kwargs)
        if not self.patched_tokens:
            return optimizer
        for group in optimizer.param_groups:
            if self._given_optimizers[0] is None:
                group["lr"] = self.args.token_learning_rate
            elif group.get("weight_decay") and group["params"]:
                raise ValueError(
                    f"The optimizer in `optimizers` has a weight decay of {group['weight_decay']}, which would move the embeddings "
                    'of all tokens, and only those of the trigger are patched. Give it none, or set `patch_scope="full"`.'
                )
        return optimizer

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        # Decay would move the rows of all tokens, not only those that get a gradient.
        return [] if self.patched_tokens else super().get_decay_parameter_names(model)

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> TrainOutput:
        """Find the triggers if that has not been done, then patch. See [`~transformers.Trainer.train`].

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*): Checkpoint folder, or `True` for the newest complete one
                in `output_dir`. The trainer must have been built with the original, unpatched model.

        Raises:
            LocalityBudgetError: If clean features moved further than `args.locality_budget`. The model then has the
                weights that it had before training and cannot be saved as a patch; checkpoints that the run wrote to
                `output_dir`, before it was resumed too, are removed.
            ValueError: If the checkpoint is of another model, of other reports or clean inputs, or of other settings.
        """
        self._require_train_inputs()
        self.locality = self.merge_error = None
        # Of a model that is trained on they are no longer true
        self.figures = {}
        self._resumed = (0, False)
        if resume_from_checkpoint:
            resume_from_checkpoint = self.take_up(resume_from_checkpoint)
            self._resumed = where_it_was(resume_from_checkpoint)
        self._prepare()
        self._metrics["train"] = (
            load_interval(resume_from_checkpoint, self.args.device) if resume_from_checkpoint else []
        )
        if resume_from_checkpoint and self._reinversion is not None:
            self._reinversion.found = load_again(resume_from_checkpoint, len(self._reinversion.stamps))
        tokens = only_embeddings_of(self.model, self.patched_tokens) if self.patched_tokens else nullcontext()
        with (
            evaluated_afterwards(self.encoder.model),
            frozen(self._resting),
            tokens,
            own_special_tokens(self),
            use_cache(self.model.config, self.args.use_cache),
            self._within_budget(resume_from_checkpoint),
        ):
            if self.patched_tokens and not (resume_from_checkpoint or self._neutralised):
                self._neutralised = True
                sample = self._inputs["train_dataset"].sample(_TOKEN_COUNT_INPUTS, self.args.seed)
                with self.encoder.over_processes():
                    self._spend(neutralise_unseen(self.encoder, self.patched_tokens, sample)[1])
            try:
                output = super().train(resume_from_checkpoint=resume_from_checkpoint or None, **kwargs)
            finally:
                self._without_autocast()
        if self.locality is not None:
            output.metrics.update(self._movement())
        if self.remembered:
            for earlier, cosine in zip(self.remembered, self._earlier_repairs(), strict=True):
                earlier.cosine_after = cosine
            report_earlier_repairs(self.remembered)
        return output

    def set_initial_training_values(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        epochs, steps_per_epoch, *others, max_steps = super().set_initial_training_values(*args, **kwargs)
        step, stopped = self._resumed
        if step >= max_steps or (stopped and self.args.stop_when_fixed):
            # All is done; the base class would see so after one more step
            epochs = min(epochs, step // steps_per_epoch)
        return epochs, steps_per_epoch, *others, max_steps

    @contextmanager
    def _within_budget(self, resumed_from: str | bool | None) -> Iterator[None]:
        """Within it, the locality budget is kept and features stay finite, or all weights are put back."""
        self.rollback.begin(resumed_from or None)
        if self._guard is None:
            try:
                yield
            except NonFiniteError as error:
                self.rollback.refused = error
                raise
            return
        self.rollback.keep(self.model, [given for given in self._given_optimizers if given is not None])
        try:
            yield
        except (LocalityBudgetError, NonFiniteError) as error:
            refused = error if isinstance(error, LocalityBudgetError) else diverged(error)
            self.rollback.take_back(refused, remove=self.args.should_save)
            # The next run starts where this one did
            self.optimizer, self.lr_scheduler = self._given_optimizers
            self.is_in_train = self._neutralised = False
            if self._reinversion is not None:
                self._reinversion.forget()
            raise refused from error
        self.rollback.let_stand()

    def _check_locality(self) -> None:
        """Measure the finished patch, while trackers still listen."""
        self._without_autocast()
        self.locality = self._guard.check_at_the_end()
        self.log(self._movement())

    def _movement(self) -> dict[str, float]:
        return {"locality_distance": self.locality.mean, "locality_distance_nearest": max(self.locality.nearest)}

    def what_is_left(self) -> list[Remains]:
        """What is left of each bug in the model as it is now, by forward passes alone.

        Raises:
            ValueError: If neither training nor evaluation has begun: where the triggers led is then not known.
        """
        if not self._prepared:
            raise ValueError("Nothing is known of the model before patching. Call `trainer.train()` first.")
        inputs = self._sample(self.args.inversion_inputs)
        with nullcontext() if self._is_split else self.encoder.over_processes():
            clean = self.encoder.encode(inputs)
            ceilings = self.data_collator.ceilings.tolist()
            return [
                remains(TransferMeter(self.encoder, bug.misclassified, inputs, led_to, clean), bug, trigger, ceiling)
                for bug, trigger, led_to, ceiling in zip(
                    self.bug_instances, self.triggers, self._led_to, ceilings, strict=True
                )
            ]

    def take_up(self, resume_from_checkpoint: str | bool) -> str:
        """Take over the triggers of a checkpoint, instead of inverting the reports; `train()` does it when it resumes.

        Args:
            resume_from_checkpoint (`str` or `bool`): As in [`train`].

        Returns:
            `str`: Folder of the checkpoint.

        Raises:
            ValueError: If there is no complete one, or it is of another model, of other reports or clean inputs, or of other settings.
        """
        checkpoint = checkpoint_to_resume(
            self.args.output_dir, resume_from_checkpoint, has_optimizer=not self._is_split
        )
        check_same_run(
            checkpoint,
            self.base_weights_sha256,
            self._reports,
            {
                **recorded_settings(self.args),
                "feature_source": self.encoder.feature_source,
                "processes": self.args.world_size,
            },
            self.clean_inputs_sha256,
            None if self.triggers is None else [None if e is None else e.summary() for e in self.triggers],
        )
        if not self._prepared:
            self._take_triggers_from(checkpoint)
        return checkpoint

    @cached_property
    def clean_inputs_sha256(self) -> str | None:
        """Hash of the clean inputs, by which a resumed run knows them; `None` without any."""
        inputs = self._inputs.get("train_dataset")
        return None if inputs is None else clean_inputs_sha256(inputs, self.args.seed)

    def _take_triggers_from(self, checkpoint: str) -> None:
        """Go on with the reports, triggers and earlier triggers that a checkpoint was trained with."""
        if self.args.remember_triggers:
            self.remembered = load_remembered(checkpoint, own=False) or self.remembered
        record = read_record(checkpoint) or {}
        self._moved_before = record.get("moved_levels")
        if self.triggers is None:
            self.skipped = record.get("skipped", [])
            self.bug_instances = [bug for i, bug in enumerate(self._reports) if i not in self.skipped]
            self.triggers = load_reported_triggers(checkpoint, len(self.bug_instances))
            self.evidence = record.get("evidence", [])
            self.earlier_screenings = record.get("screenings", [])

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """L = L_e + λ_l · L_l + λ_g · L_g on one batch of [`PatchingCollator`], with a single forward pass."""
        training = model.training
        set_comparison_mode(model)
        before, before_references = inputs["frozen_features"], inputs["frozen_references"]
        views = {name: value for name, value in inputs.items() if not name.startswith("frozen_")}
        features = self.encoder.features(views, model)
        b, k = len(before), len(before_references)
        clean, stamped, misclassified, reference, stamped_reference = features.split([b, b, k, k, k])
        if not training:
            # Processes evaluate some rows twice so that all have as many; a mean over them would depend on their number
            clean, stamped, before = self.accelerator.gather_for_metrics((clean, stamped, before))

        weight = self.args.reference_weight
        losses = mudjacking_loss(
            effectiveness_loss(misclassified, reference, inputs["frozen_ceilings"]),
            locality_loss(clean, before, reference, before_references, weight),
            generalizability_loss(stamped, before, stamped_reference, before_references, weight),
            self.args.locality_weight,
            self.args.generalizability_weight,
        )
        with torch.no_grad():
            cosines = (-losses.effectiveness, mean_cosine(clean, before), mean_cosine(stamped, clean))
            values = torch.stack([losses.effectiveness, losses.locality, losses.generalizability, *cosines])
        if self._has_diverged(losses.total, training):
            raise NonFiniteError(
                f"The loss is {losses.total.item()} at step {self.state.global_step}: features became NaN or infinite. "
                "Lower `learning_rate`, or use `bf16` or float32 instead of `fp16`. The weights are of no use, and those of the "
                "last checkpoints may be so already."
            )
        self._metrics["train" if training else "eval"].append((len(clean), values.detach()))
        self.forward_equivalents += self.args.world_size * len(features) * (3 if training else 1)
        return (losses.total, {"features": features}) if return_outputs else losses.total

    def training_step(self, model: nn.Module, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """One step, whose stamped rows carry what depends on the model as it is now; batches are made ahead of it."""
        if self._reinversion is None and self._adversarial is None and self._latent is None:
            return super().training_step(model, inputs, *args, **kwargs)
        set_comparison_mode(model)
        inputs = self._prepare_inputs(inputs)
        pixels, rows = inputs["pixel_values"], inputs["frozen_rows"]
        stamped = slice(len(rows), 2 * len(rows))
        with ExitStack() as changed:
            with self.compute_loss_context_manager():
                if self._reinversion is not None:
                    pixels[stamped] = self._reinversion.restamp(pixels[stamped], rows)
                if self._adversarial is not None:
                    pixels[stamped] = self._adversarial.moved(pixels[stamped], rows)
                if self._latent is not None:
                    changed.enter_context(self._latent.carried(pixels[stamped], rows, first=len(rows)))
            return super().training_step(model, inputs, *args, **kwargs)

    def _has_diverged(self, loss: Tensor, training: bool) -> bool:
        """Whether a loss is not finite; of several processes, once all of them can tell, since one that stops leaves the others waiting.

        What one of them has reaches the weights of all with its gradients.
        """
        if torch.isfinite(loss):
            return False
        alone = not training or self.args.world_size == 1
        return alone or not all(torch.isfinite(p).all() for p in self.model.parameters() if p.requires_grad)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the means of losses and cosines since the last log to the training logs."""
        if "loss" in logs:
            logs = {**logs, **self._mean_metrics("train")}
        super().log(logs, start_time)

    # ---- Evaluation ----

    def evaluate(
        self,
        eval_dataset: datasets.Dataset | datasets.IterableDataset | dict[str, datasets.Dataset] | str | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Losses and cosines on held-out clean inputs.

        Args:
            eval_dataset (`datasets.Dataset`, `datasets.IterableDataset`, `dict` or `str`, *optional*): Clean inputs; those that
                the trainer was given, or the one of those by this name.
            ignore_keys, metric_key_prefix: See [`~transformers.Trainer.evaluate`].

        Returns:
            `dict[str, float]`: `eval_loss`, its terms and cosines, and the callbacks' metrics.

        Raises:
            ValueError: If a new dataset is given after patching has begun: its frozen features can no longer be computed.
        """
        self._prepare()
        if (self.args.bf16 or self.args.fp16) and not (self.is_in_train or self._is_split):
            # The base class does so before the first run alone
            self.accelerator.prepare_model(self.model, evaluation_mode=True)
        try:
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        finally:
            if not self.is_in_train:
                self._without_autocast()

    def get_train_dataloader(self) -> DataLoader:
        self._prepare()
        return super().get_train_dataloader()

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Batches of held-out clean inputs; see [`evaluate`] for the datasets and the error."""
        self._prepare()
        if isinstance(eval_dataset, (datasets.Dataset, datasets.IterableDataset)):
            if self.state.global_step > 0 and self.rollback.refused is None:
                raise ValueError(
                    "The model is already patched, so features of a new dataset before patching are not known. Pass "
                    "`eval_dataset` to `MudjackingTrainer` instead."
                )
            inputs = clean_inputs(
                self.encoder.modality, eval_dataset, self.args.max_inputs, self.args.seed, "eval_dataset"
            )
            eval_dataset = PatchingDataset(inputs, self.encoder, self.args.per_device_eval_batch_size, self._silent)
            # With persistent workers the base class keeps one loader for all datasets without a name
            vars(self).get("_eval_dataloaders", {}).pop("eval", None)
        return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader:
        """There is nothing to predict; see [`predict`]."""
        return self.predict()

    def predict(self, *args: Any, **kwargs: Any) -> PredictionOutput:
        """There is nothing to predict.

        Raises:
            ValueError: Always; the message says what to call instead.
        """
        raise ValueError(
            "An encoder has features and no predictions: `trainer.encoder.encode(inputs)` gives them, for a downstream classifier."
        )

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        self._metrics["eval"].clear()
        with evaluated_afterwards(self.encoder.model):
            output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        means = self._mean_metrics("eval")
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in means.items()})
        return output

    def _mean_metrics(self, mode: str) -> dict[str, float]:
        """Means over inputs, and over processes, since the last call."""
        rows = self._metrics[mode]
        if not rows:
            return {}
        sums = torch.stack([count * values for count, values in rows]).sum(dim=0)
        total = torch.cat([sums, sums.new_tensor([sum(count for count, _ in rows)])])
        total = self.accelerator.reduce(total, reduction="sum")
        rows.clear()
        return dict(zip(_METRICS, (total[:-1] / total[-1]).tolist(), strict=True))

    # ---- Small helpers ----

    def _without_autocast(self) -> None:
        """Take away what accelerate leaves around `forward` under bf16 and fp16: what is encoded now is the saved model.

        The next training or evaluation puts it back, which accelerate does only for models that it has not prepared yet.
        """
        self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        vars(self.model).pop("_is_accelerate_prepared", None)

    def _spend(self, forwards: int) -> None:
        """Count forward passes beside the steps', of all processes together."""
        self.forward_equivalents += forwards

    def _spend_in_all(self, forwards: int) -> None:
        """Count forward passes of this process and of the others, all of which must call it."""
        if self.args.world_size > 1:
            mine = torch.tensor(forwards, device=self.accelerator.device)
            forwards = int(self.accelerator.reduce(mine, reduction="sum"))
        self._spend(forwards)

    @property
    def moved_levels(self) -> float | None:
        """By how many levels of 255 this run moved stamped pictures (`adversarial_levels`); `None` if it moved none."""
        views = self._adversarial
        return views.levels if views is not None and views.used else self._moved_before

    @property
    def _is_split(self) -> bool:
        """Whether processes hold a part of the weights each, so that a forward pass is one of all of them."""
        return self.is_fsdp_enabled or self.is_deepspeed_enabled

    @property
    def _silent(self) -> bool:
        return self.args.disable_tqdm or not self.is_local_process_zero()

    def _require_train_inputs(self) -> CleanInputs:
        if "train_dataset" not in self._inputs:
            raise ValueError(
                "There is no `train_dataset`. Pass clean, unlabelled inputs: locality is measured on them, and candidate "
                "triggers are verified on them."
            )
        return self._inputs["train_dataset"]

    def _clean(self, dataset: datasets.Dataset | datasets.IterableDataset, args: MudjackingConfig) -> CleanInputs:
        """The training inputs: no more than `max_inputs`, nor than the steps can read."""
        per_step = args.inputs_per_step
        limit = args.max_inputs if args.max_steps < 0 else min(args.max_inputs, args.max_steps * per_step)
        limit = min(max(limit, args.inversion_inputs), args.max_inputs)
        inputs = clean_inputs(self.encoder.modality, dataset, limit, args.seed, multiple=per_step)
        if args.max_inputs < per_step:
            raise ValueError(
                f"`max_inputs={args.max_inputs}` is less than the {per_step} inputs of one step. Raise it, or lower "
                "`per_device_train_batch_size`."
            )
        if len(inputs) < per_step:
            raise ValueError(
                f"`train_dataset` has {len(inputs)} inputs; one step needs {per_step} (per_device_train_batch_size "
                f"{args.per_device_train_batch_size} × gradient_accumulation_steps {args.gradient_accumulation_steps} × "
                f"{args.world_size} processes). Pass more clean inputs, a thousand or more for good utility, or lower "
                "`per_device_train_batch_size`."
            )
        return inputs


def _named_eval_datasets(eval_dataset: Any) -> dict[str, Any]:
    if eval_dataset is None:
        return {}
    if isinstance(eval_dataset, dict):
        return {f"eval_dataset_{name}": dataset for name, dataset in eval_dataset.items()}
    return {"eval_dataset": eval_dataset}
