# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""Clean inputs with frozen features, and batches that hold every view a step needs."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from .bug_instance import BugInstance
from .clean_inputs import CleanInputs
from .encoder import Encoder
from .feature_store import stored_features
from .kept_views import KeptViews
from .preprocessing import ImagePreprocessor, RawInput, TextPreprocessor
from .triggers import Trigger


# Inputs that resemble a reference, as a share of all, and how often each of them comes again: they make up a third of the rows.
_RESEMBLING, _AGAIN = 0.05, 10


def turn_and_stamp(row: int, stamps: int) -> tuple[int, int]:
    """Which of a number of stamps a row of the dataset carries, as the second of two; the first is how often that one came before.

    All that is done to a row goes by its number, so that batches of any size and any process do it alike.
    """
    return divmod(row, stamps)


class PatchingDataset(Dataset):
    """Clean inputs with the features that the frozen model gave them.

    The frozen model's features never change while its copy is patched, so they are computed once; no second model
    stays in memory. The processes of a run share the work, and those of a machine one copy: see [`stored_features`].

    Args:
        inputs (`CleanInputs`): N clean inputs.
        encoder (`Encoder`): The encoder before patching.
        batch_size (`int`): Inputs per forward pass.
        disable_tqdm (`bool`): Whether to hide the progress bar.
        keep_views (`bool`, *optional*, defaults to `False`): Whether pictures are kept as the model gets them, up to
            1 GiB: see [`~hf_mudjacking.kept_views.KeptViews`].
        num_workers (`int`, *optional*, defaults to 0): Processes that read and prepare pictures for the frozen model.

    A row is a `dict` with `index`, the number of its input, `frozen_features` and either `input`, raw, or `views`, kept from an
    earlier use; `kept` is where to keep them.
    """

    def __init__(
        self,
        inputs: CleanInputs,
        encoder: Encoder,
        batch_size: int,
        disable_tqdm: bool,
        keep_views: bool = False,
        num_workers: int = 0,
    ) -> None:
        self.inputs = inputs
        self.kept = KeptViews() if keep_views else None
        self.frozen_features = stored_features(
            encoder, inputs, batch_size, disable_tqdm, f"Frozen features of {inputs.name}", num_workers
        )
        # Numbers of the inputs that the rows are made of
        self.rows = list(range(len(inputs)))

    def lean_towards(self, reference: Tensor, multiple: int = 1) -> None:
        """Have the inputs that resemble a reference most come about eleven times as often as the others.

        A trigger that works on one class alone can be unlearned on inputs of that class alone, and those are few.

        Args:
            reference (`FloatTensor` of shape `(D,)`): Its feature before patching.
            multiple (`int`, *optional*, defaults to 1): What the number of further rows is a multiple of: the inputs of a step, so
                that none is smaller than the others.
        """
        count = max(round(_RESEMBLING * len(self.inputs)), 1)
        resembling = (self.frozen_features @ reference).topk(count).indices.tolist()
        further = max(round(_AGAIN * count / multiple), 1) * multiple
        self.rows += list(itertools.islice(itertools.cycle(resembling), further))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict[str, Any]:
        index = self.rows[number]
        row = {"index": index, "frozen_features": self.frozen_features[index]}
        if self.kept is None:
            return {"input": self.inputs[index], **row}
        views = self.kept.get(index)
        if views is None:
            return {"input": self.inputs[index], "kept": self.kept, **row}
        return {"views": views, **row}


@dataclass
class PatchingCollator:
    """Collates rows into one batch of everything a step needs, for a single forward pass.

    Args:
        preprocessor (`ImagePreprocessor` or `TextPreprocessor`): Stamps raw inputs and turns them into model inputs.
        bug_instances (`list[BugInstance]`): K reports.
        triggers (`list[Trigger]`): Their triggers; `None` for a report without one, whose reference stays unstamped.
        frozen_references (`FloatTensor` of shape `(K, D)`): Features of the references before patching.
        ceilings (`FloatTensor` of shape `(K,)`): Cosine with its reference that each misclassified input is to reach.
        stamps (`list[list[Trigger | None]]`): U triggers that clean inputs carry in turn, each followed by altered versions of it;
            see [`turn_and_stamp`]. Every second row that carries it has it as it was found, the others have an
            altered one in turn. Without any, and for `None`, x ⊕ e is x, which L_g then holds as L_l does.

    Returns a `dict` with:
        - `frozen_features` (`FloatTensor` of shape `(B, D)`): features of the B clean inputs before patching;
        - `frozen_rows` (`LongTensor` of shape `(B,)`): their numbers in the dataset;
        - `frozen_references` (`FloatTensor` of shape `(K, D)`) and `frozen_ceilings` (`FloatTensor` of shape `(K,)`);
        - the model inputs of 2B + 3K raw inputs: x, x ⊕ e, x_b, x_r, x_r ⊕ e, in this order.
    """

    preprocessor: ImagePreprocessor | TextPreprocessor
    bug_instances: list[BugInstance]
    triggers: list[Trigger | None]
    frozen_references: Tensor
    ceilings: Tensor
    stamps: list[list[Trigger | None]]

    def __post_init__(self) -> None:
        references = [bug.reference for bug in self.bug_instances]
        stamped = [self._stamp(trigger, x) for trigger, x in zip(self.triggers, references, strict=True)]
        # One view a step, not one a sample: the report is the same in every batch.
        self._report = [*(bug.misclassified for bug in self.bug_instances), *references, *stamped]
        # How long texts become depends on the others of the batch; a picture is prepared by itself
        self._images = isinstance(self.preprocessor, ImagePreprocessor)
        self._report_pixels = list(self.preprocessor(self._report)["pixel_values"]) if self._images else []

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        return {
            "frozen_features": torch.stack([row["frozen_features"] for row in rows]),
            "frozen_rows": torch.tensor([row["index"] for row in rows]),
            "frozen_references": self.frozen_references,
            "frozen_ceilings": self.ceilings,
            **(self._pixels(rows) if self._images else self.preprocessor([*self._both(rows), *self._report])),
        }

    def _both(self, rows: list[dict[str, Any]]) -> list[RawInput]:
        """x of all rows, then x ⊕ e of all rows."""
        stamped = [self._stamp(self._stamp_of(row["index"]), row["input"]) for row in rows]
        return [*(row["input"] for row in rows), *stamped]

    def _pixels(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Model inputs of images: those that are kept, and the others, which are kept from now on."""
        fresh = [row for row in rows if "views" not in row]
        made: dict[int, tuple[Tensor, Tensor]] = {}
        if fresh:
            pixels = self.preprocessor(self._both(fresh))["pixel_values"]
            pairs = zip(pixels[: len(fresh)], pixels[len(fresh) :], strict=True)
            made = {row["index"]: pair for row, pair in zip(fresh, pairs, strict=True)}
        for row in fresh:
            if "kept" in row:
                row["kept"].keep(row["index"], made[row["index"]])
        clean, stamped = zip(*(row.get("views") or made[row["index"]] for row in rows), strict=True)
        return {"pixel_values": torch.stack([*clean, *stamped, *self._report_pixels])}

    def _stamp_of(self, index: int) -> Trigger | None:
        if not self.stamps:
            return None
        turn, number = turn_and_stamp(index, len(self.stamps))
        found, *altered = self.stamps[number]
        return altered[turn // 2 % len(altered)] if altered and turn % 2 else found

    def _stamp(self, trigger: Trigger | None, x: RawInput) -> RawInput:
        return x if trigger is None else self.preprocessor.stamp(trigger, x)
