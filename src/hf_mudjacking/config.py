# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""`MudjackingConfig`."""

from __future__ import annotations

import logging
import math
import re
from dataclasses import dataclass, field
from numbers import Real
from typing import get_args

from transformers import TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from .encoder import FeatureSource


logger = logging.getLogger(__name__)

_PATCH_SCOPES = ("auto", "full", "trigger_tokens")
_ON_UNVERIFIED = ("refuse", "patch", "skip")
# What evidence can be.
EVIDENCE_RANGE = (-1.5, 1.0)
_WHOLE = (
    "max_steps", "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "max_inputs",
    "inversion_inputs", "altered_triggers", "reinversions", "seed",
)  # fmt: skip
_NUMBERS = (
    "locality_weight", "generalizability_weight", "reference_weight", "learning_rate", "token_learning_rate",
    "max_trigger_area", "min_evidence", "adversarial_levels", "latent_strength", "locality_budget", "stop_effectiveness",
    "stop_locality", "stop_generalizability",
)  # fmt: skip
# Options of `TrainingArguments` that would break what is promised, and why.
_CAST = (
    "it casts the model itself to half precision, which patch and rollback would then have; pass `bf16=True` for speed"
)
_NOT_HERE = {
    "bf16_full_eval": _CAST,
    "fp16_full_eval": _CAST,
    "label_smoothing_factor": "there are no labels",
    "neftune_noise_alpha": "features are compared without anything random",
    "remove_unused_columns": "columns are chosen by the trainer, and a row has others than the model takes",
}
# Names of our losses, with the prefixes that evaluation gives them
_LOSS = re.compile(r"(^|_)loss_(effectiveness|locality|generalizability)$")
# Default of `TrainingArguments`
_EPOCHS = 3.0


@dataclass
class MudjackingConfig(TrainingArguments):
    r"""
    Configuration class for the [`MudjackingTrainer`].

    This class includes only the parameters that are specific to Mudjacking, and those of
    [`~transformers.TrainingArguments`] whose default differs; see its documentation for the rest.

    > Parameters that control the loss

    locality_weight (`float`, *optional*, defaults to `1.0`):
        λ_l, weight of the locality loss.
    generalizability_weight (`float`, *optional*, defaults to `1.0`):
        λ_g, weight of the generalizability loss.
    reference_weight (`float`, *optional*, defaults to `1.0`):
        Weight of the terms of the reference input x_r within both losses. 1.0 makes it weigh as much as all validation
        inputs together, as in the released code.

    > Parameters that control what is patched

    patch_scope (`str`, *optional*, defaults to `"auto"`):
        `"full"` trains all weights (or the adapter). `"trigger_tokens"`, for text, trains only the input embeddings of
        the triggers' tokens: a text without them keeps its features to the last bit. `"auto"` is the second for text
        without an adapter where each report has its trigger, else the first.
    token_learning_rate (`float`, *optional*, defaults to `1e-2`):
        Peak learning rate of `"trigger_tokens"`, instead of `learning_rate`.

    > Parameters that control the features

    feature_source (`str`, *optional*, defaults to `"auto"`):
        `"auto"`, `"cls"`, `"mean"`, `"pooler"` or `"projection"`.

    > Parameters that control the data

    max_inputs (`int`, *optional*, defaults to `10000`):
        Largest number of clean inputs that are used, drawn at random from a dataset or read from the start of a stream;
        never more than the steps can read. 10,000 is what the released training log shows.

    > Parameters that control the inversion

    inversion_inputs (`int`, *optional*, defaults to `32`):
        Number of clean inputs on which candidate triggers are verified.
    max_trigger_area (`float`, *optional*, defaults to `0.4`):
        Largest share of the picture that the part of a patch that fires may cover; the whole patch, and triggers of other
        kinds, may cover more. For images.
    min_evidence (`float`, *optional*, defaults to `0.5`):
        Least evidence of an inverted trigger (its transfer, less that of clean content under the same mask and the price
        of its area); with less, the report counts as unverified.
    on_unverified (`str`, *optional*, defaults to `"refuse"`):
        What becomes of a report whose verdict is another than `"trigger"`, see [`~hf_mudjacking.Screening`]. `"refuse"`
        stops with an `UnverifiedTriggerError`. `"skip"` leaves the report out, with a warning, and stops if none is left.
        `"patch"` repairs it all the same: with its trigger if only its pair is doubted; without one, for which
        `trainer.triggers` holds `None`, if none was verified (see `latent_strength`).

    altered_triggers (`int`, *optional*, defaults to `32`):
        Number of altered versions of each trigger (moved by up to an eighth of the picture, scaled, cut, in other colours,
        translucent; of a signal, what the report leaves open) that every second stamped input carries. A repair of the
        very trigger that was found leaves its neighbours alive. At no cost in forward passes; `0` stamps it as found. For
        images.

    reinversions (`int`, *optional*, defaults to `4`):
        How many times, evenly over the steps, the reports are inverted anew in the half-patched model; what still works then
        is stamped as well, if it does more than ordinary content. Up to two and a half thousand forward passes each.
        For images.

    adversarial_levels (`float`, *optional*):
        By how many levels of 255 every second stamped input is moved towards h(x_b), in the model as it is, before it is learned
        from, see [`~hf_mudjacking.adversarial_views.AdversarialViews`]; one that carries a warp is also warped further, by up to a
        128th of its side for each level. Less of the trigger is left then, most where what was found is only near the true one, for
        about 40 % more forward passes and up to a point and a half of BA; measured in `docs/attacks.md`. `None` moves by `2.0` what
        carries any trigger but a small opaque patch at its place that works on all inputs, whose pixels a report shows as they are
        and of which no more than 60 % are there by their looks alone, and that too once `reinversions` find more than it; `0.0`
        moves nothing. For images.

    latent_strength (`float`, *optional*, defaults to `0.6`):
        For a report without a verified trigger, what clean inputs carry instead, three quarters of the way through the encoder:
        the difference that x_b and x_r have there, of a length of up to this share of the hidden state's, or what else leads to
        h(x_b), see [`~hf_mudjacking.latent.LatentStamps`]. Backdoors whose trigger is another one in each picture are unlearned so.
        It costs up to a quarter more forward passes; `0` repairs such a report by effectiveness and locality alone. For images.
        With 0.6 two input-aware backdoors (ResNet for CIFAR-10, 600 steps) end at an ASR of 1.4 and 6.8 (49 and 20 with 0), BA
        falls by 0.0 and 1.1; with 0.9 they end at 0.5 and 1.2, and BA falls by 1.6 and 4.3.

    > Parameters that guard what is there already

    remember_triggers (`bool`, *optional*, defaults to `True`):
        Whether a model loaded from the folder of an earlier patch keeps that repair: the triggers in the folder are stamped
        along with the new ones, checked before and after, and saved with the new patch.
    locality_budget (`float`, *optional*, defaults to `0.1`):
        Largest mean cosine distance of clean features from their frozen ones that a finished run may leave, measured on
        256 inputs of `eval_dataset`, else of `train_dataset`. A run that leaves more, or that is three times over it after
        a third or two thirds of its steps, is rolled back with a `LocalityBudgetError`; until it
        is over, nothing is uploaded. `None` measures nothing.
        The authors' log ends at 0.02, with 0.10 half-way. On the digits ViT (BA 0.980) 300 steps end at 0.004 (BA 0.972),
        40 steps at 0.07 (0.940), LoRA of rank 4 at 0.05 (0.946) or, with a learning rate of 3e-3, at 0.006 (0.965): the
        default stops damage, and a tenth of it is what a good repair needs.

    > Parameters that control stopping

    stop_when_fixed (`bool`, *optional*, defaults to `True`):
        Whether to stop as soon as all three cosines, averaged over a logging interval, have reached their thresholds.
        Stopping when the bug is merely fixed is the worst moment for utility: locality falls first and recovers later.
    stop_effectiveness, stop_locality, stop_generalizability (`float`, *optional*, default to `0.99`, `0.995`, `0.995`):
        Thresholds of the mean cosines. Of effectiveness, 1 less what the cosine of x_b with x_r lacks to the one that x_b without
        its trigger has, where that is known: two texts of one class need not be alike.

    > [!NOTE]
    > These parameters have default values different from [`~transformers.TrainingArguments`]:
    > - `max_steps`: `300` instead of `-1`.
    > - `per_device_train_batch_size`: `32` instead of `8`.
    > - `per_device_eval_batch_size`: `32` instead of `8`.
    > - `learning_rate`: `3e-4` instead of `5e-5`.
    > - `lr_scheduler_type`: `"cosine"` instead of `"linear"`.
    > - `warmup_steps`: `0.05` (share of all steps) instead of `0`.
    > - `logging_steps`: `10` instead of `500`.
    > - `remove_unused_columns`: `False` instead of `True`.
    > - `ddp_find_unused_parameters`: `False` instead of `None`: parameters without influence on the features rest anyway.

    Optimiser, schedule and learning rate were chosen on the digits ViT with the true trigger (300 steps of 32, mean of two
    seeds, BA before patching 0.980): AdamW 1e-4, 3e-4 and 1e-3 with cosine decay end at a locality cosine of 0.993, 0.996 and
    0.997 and RA 0.974 to 0.977; linear and constant schedules are within 0.002 of that; SGD 1e-2 reaches 0.995, the published
    SGD 1e-3 reaches 0.992. 3e-4 is the middle of the flat part.
    """

    max_steps: int = field(default=300, metadata={"help": "Total number of optimiser steps."})
    per_device_train_batch_size: int = field(default=32, metadata={"help": "Clean inputs per device and step."})
    per_device_eval_batch_size: int = field(default=32, metadata={"help": "Clean inputs per device in evaluation."})
    learning_rate: float = field(default=3e-4, metadata={"help": "Peak learning rate of AdamW."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Learning rate schedule."})
    warmup_steps: float = field(default=0.05, metadata={"help": "Warm-up steps, or their share of all steps below 1."})
    logging_steps: float = field(default=10, metadata={"help": "Log every so many steps."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Columns are chosen by the trainer."})
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Whether DDP looks for parameters without gradient at each step."}
    )

    locality_weight: float = field(default=1.0, metadata={"help": "Weight of the locality loss."})
    generalizability_weight: float = field(default=1.0, metadata={"help": "Weight of the generalizability loss."})
    reference_weight: float = field(
        default=1.0,
        metadata={"help": "Weight of the reference input within the locality and generalizability losses."},
    )
    patch_scope: str = field(default="auto", metadata={"help": "What is patched.", "choices": list(_PATCH_SCOPES)})
    token_learning_rate: float = field(default=1e-2, metadata={"help": "Peak learning rate of token embeddings."})
    feature_source: str = field(
        default="auto", metadata={"help": "Where features are read.", "choices": list(get_args(FeatureSource))}
    )
    max_inputs: int = field(default=10_000, metadata={"help": "Largest number of clean inputs that are used."})
    inversion_inputs: int = field(default=32, metadata={"help": "Clean inputs on which candidates are verified."})
    max_trigger_area: float = field(
        default=0.4, metadata={"help": "Largest share of the picture that the part of a patch that fires may cover."}
    )
    altered_triggers: int = field(default=32, metadata={"help": "Altered versions of each trigger that are stamped."})
    reinversions: int = field(default=4, metadata={"help": "Times that reports are inverted anew while patching."})
    adversarial_levels: float | None = field(
        default=None, metadata={"help": "Levels of 255 that stamped inputs are moved by towards the reported feature."}
    )
    latent_strength: float = field(
        default=0.6, metadata={"help": "Largest share of a hidden state that is added for reports without a trigger."}
    )
    min_evidence: float = field(default=0.5, metadata={"help": "Least evidence of an inverted trigger."})
    on_unverified: str = field(
        default="refuse", metadata={"help": "What becomes of an unverified report.", "choices": list(_ON_UNVERIFIED)}
    )
    remember_triggers: bool = field(default=True, metadata={"help": "Keep the repairs of earlier patches."})
    locality_budget: float | None = field(
        default=0.1, metadata={"help": "Largest mean cosine distance that clean features may move by."}
    )
    stop_when_fixed: bool = field(
        default=True, metadata={"help": "Stop once the bug is fixed and locality has recovered."}
    )
    stop_effectiveness: float = field(
        default=0.99, metadata={"help": "1 less how far x_b is from its ceiling, to stop at."}
    )
    stop_locality: float = field(default=0.995, metadata={"help": "Mean cosine of clean features to stop at."})
    stop_generalizability: float = field(default=0.995, metadata={"help": "Mean cosine of stamped inputs to stop at."})

    @property
    def inputs_per_step(self) -> int:
        """Clean inputs of one optimiser step, in all processes."""
        return self.train_batch_size * self.gradient_accumulation_steps * self.world_size

    def __post_init__(self) -> None:
        if self.greater_is_better is None and _LOSS.search(self.metric_for_best_model or ""):
            # The base class knows a loss by the end of its name
            self.greater_is_better = False
        super().__post_init__()
        for name in _NUMBERS:
            value = getattr(self, name)
            none = value is None and name in ("locality_budget", "adversarial_levels")
            if not none and (isinstance(value, bool) or not isinstance(value, Real)):
                hint = " YAML takes `3e-4` for a text; write `3.0e-4`." if isinstance(value, str) else ""
                raise ValueError(f"`{name}={value!r}` must be a number.{hint}")
        for name in ("stop_when_fixed", "remember_triggers"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"`{name}={getattr(self, name)!r}` must be true or false.")
        for name in ("stop_effectiveness", "stop_locality", "stop_generalizability"):
            if not -1 <= getattr(self, name) <= 1:
                raise ValueError(f"`{name}={getattr(self, name)}` is no cosine; it must lie between -1 and 1.")
        for name in ("locality_weight", "generalizability_weight", "reference_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(
                    f"`{name}={getattr(self, name)}` is no weight of a loss; it must be finite, 0 or more."
                )
        for name in ("learning_rate", "token_learning_rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"`{name}={getattr(self, name)}` is no learning rate; it must lie above 0.")
        for name, why in _NOT_HERE.items():
            if getattr(self, name):
                raise ValueError(f"`{name}={getattr(self, name)}` cannot be used here: {why}.")
        if self.train_sampling_strategy not in ("random", "sequential"):
            raise ValueError(
                f"`train_sampling_strategy={self.train_sampling_strategy!r}` cannot be used here: a row is a raw input, which has no "
                "length yet. Use `random` or `sequential`."
            )
        if self.accelerator_config.dispatch_batches:
            raise ValueError(
                "`dispatch_batches` of `accelerator_config` cannot be used here: every batch holds the report, which would be "
                "split among the processes."
            )
        for name in _WHOLE:
            if isinstance(getattr(self, name), bool) or not isinstance(getattr(self, name), int):
                raise ValueError(f"`{name}={getattr(self, name)!r}` must be a whole number.")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"`seed={self.seed}` is out of range; it must be 0 or more, below 2**32.")
        for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}={getattr(self, name)}` must be at least 1.")
        if self.max_steps == 0 or (self.max_steps < 0 and self.num_train_epochs <= 0):
            raise ValueError(
                f"`max_steps={self.max_steps}`, `num_train_epochs={self.num_train_epochs}`: a run needs at least one step. Where "
                "`max_steps` is -1, epochs count."
            )
        if self.max_steps > 0 and self.num_train_epochs != _EPOCHS:
            logger.warning(
                f"`num_train_epochs={self.num_train_epochs}` does nothing beside `max_steps={self.max_steps}`. Pass `max_steps=-1` "
                "to count epochs."
            )
        if self.stop_when_fixed and self.logging_strategy == IntervalStrategy.NO:
            logger.warning(
                '`stop_when_fixed` goes by what is logged: with `logging_strategy="no"` all steps are made.'
            )
        if not 0 < self.max_trigger_area <= 1:
            raise ValueError(
                f"`max_trigger_area={self.max_trigger_area}` is not a share; it must lie above 0, up to 1."
            )
        least, most = EVIDENCE_RANGE
        if not least <= self.min_evidence <= most:
            raise ValueError(
                f"`min_evidence={self.min_evidence}` is out of reach; evidence lies between {least:g} and {most:g}."
            )
        if self.locality_budget is not None and not 0 < self.locality_budget <= 2:
            raise ValueError(
                f"`locality_budget={self.locality_budget}` is no cosine distance; it must lie above 0, up to 2, or be None."
            )
        if self.reinversions < 0:
            raise ValueError(
                f"`reinversions={self.reinversions}` is negative; 0 inverts reports once, before patching."
            )
        if self.adversarial_levels is not None and not 0 <= self.adversarial_levels <= 255:
            raise ValueError(
                f"`adversarial_levels={self.adversarial_levels}` is no number of levels; it must lie between 0, which moves nothing, and 255, or be None."
            )
        if not 0 <= self.latent_strength < math.inf:
            raise ValueError(
                f"`latent_strength={self.latent_strength}` is no share of a length; it must be 0 or more, and 0 stamps nothing."
            )
        if self.altered_triggers < 0:
            raise ValueError(
                f"`altered_triggers={self.altered_triggers}` is negative; 0 stamps triggers as found alone."
            )
        for name in ("max_inputs", "inversion_inputs"):
            if getattr(self, name) < 4:
                raise ValueError(f"`{name}={getattr(self, name)}` is too small; at least 4 clean inputs are needed.")
        for name, known in (("patch_scope", _PATCH_SCOPES), ("on_unverified", _ON_UNVERIFIED)):
            if getattr(self, name) not in known:
                raise ValueError(f"`{name}={getattr(self, name)!r}` is unknown; choose one of {', '.join(known)}.")
        if self.feature_source not in get_args(FeatureSource):
            raise ValueError(
                f"`feature_source={self.feature_source!r}` is unknown; choose one of "
                f"{', '.join(get_args(FeatureSource))}."
            )
