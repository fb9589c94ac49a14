# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""Triggers of a patch on disk, and those of the patches before it, which the next one must not bring back."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .encoder import Encoder
from .output import TRIGGER_FOLDER
from .patch_record import read_record
from .preprocessing import RawInput
from .safe_loading import inside
from .triggers import Trigger, load_trigger


logger = logging.getLogger(__name__)

# Clean inputs that an earlier repair is checked on.
CHECKED_ON = 64
# Fall of the mean cosine from which an earlier repair counts as worse.
_TOLERANCE = 0.02
_PREFIX = "remembered-"


@dataclass
class RememberedTrigger:
    """A trigger that an earlier patch repaired.

    Args:
        trigger (`Trigger`): The trigger.
        cosine_before (`float`, *optional*): Mean cosine of stamped with clean features before the present run; 1 if it
            does nothing. `None` if it was not measured, as for a trigger of the other tower of a model of two.
        cosine_after (`float`, *optional*): The same after the run.
    """

    trigger: Trigger
    cosine_before: float | None = None
    cosine_after: float | None = None

    def record(self) -> dict[str, Any]:
        """Summary of the trigger with both cosines."""
        return {**self.trigger.summary(), "cosine_before": self.cosine_before, "cosine_after": self.cosine_after}


def save_triggers(
    folder: str | os.PathLike[str],
    triggers: Sequence[Trigger | None],
    remembered: Sequence[RememberedTrigger],
    again: Sequence[Sequence[Trigger]] = (),
) -> None:
    """Write triggers into the folder of a patch: `_triggers/<i>` for report i, `_triggers/remembered-<i>`, and
    `_triggers/again-<u>-<k>` for what was found of stamp u while patching went on."""
    place = Path(folder) / TRIGGER_FOLDER
    for i, trigger in enumerate(triggers):
        if trigger is not None:
            trigger.save_pretrained(place / str(i))
    for i, earlier in enumerate(remembered):
        earlier.trigger.save_pretrained(place / f"{_PREFIX}{i}")
    for u, found in enumerate(again):
        for k, trigger in enumerate(found):
            trigger.save_pretrained(place / f"again-{u}-{k}")


def load_again(folder: str | os.PathLike[str], count: int) -> list[list[Trigger]]:
    """What was found of each of `count` stamps while patching went on, until a checkpoint was written."""
    place = inside(folder, TRIGGER_FOLDER)
    found = [
        sorted(place.glob(f"again-{u}-*"), key=lambda path: int(path.name.rsplit("-", 1)[1])) for u in range(count)
    ]
    return [[load_trigger(inside(place, path.name)) for path in paths] for paths in found]


def load_reported_triggers(folder: str | os.PathLike[str], count: int) -> list[Trigger | None]:
    """Triggers of the reports that a checkpoint repairs; `None` for a report that has none by its record.

    Args:
        folder (`str` or `os.PathLike`): Checkpoint.
        count (`int`): Number of reports.

    Raises:
        ValueError: If one of them is missing or damaged.
    """
    summaries = (read_record(folder) or {}).get("triggers", [])
    without = {i for i, summary in enumerate(summaries) if summary is None}
    place = inside(folder, TRIGGER_FOLDER)
    return [None if i in without else load_trigger(inside(place, str(i))) for i in range(count)]


def load_remembered(folder: str | os.PathLike[str], own: bool = True) -> list[RememberedTrigger]:
    """Triggers that the model of a folder has been repaired of; none if the folder holds no patch.

    Args:
        folder (`str` or `os.PathLike`): Folder of a patch.
        own (`bool`, *optional*, defaults to `True`): Whether to load those of its own reports too, not only those that
            it remembers itself. Of reports that share a trigger the strongest is loaded.

    Returns:
        `list[RememberedTrigger]`: Oldest first.
    """
    record = read_record(folder)
    if record is None:
        return []
    place = inside(folder, TRIGGER_FOLDER)
    earlier = sorted(
        int(number) for path in place.glob(f"{_PREFIX}*") if (number := path.name.removeprefix(_PREFIX)).isdecimal()
    )
    names = [f"{_PREFIX}{i}" for i in earlier]
    if own:
        reported = [i for i, summary in enumerate(record.get("triggers", [])) if summary is not None]
        # Earlier versions wrote no groups, and there are none before training
        numbers = [group[0] for group in record.get("trigger_groups") or [[i] for i in reported]]
        missing = [i for i in numbers if not (place / str(i)).exists()]
        if missing:
            logger.warning(
                f"`{folder}` was repaired of {len(numbers)} triggers, but {len(missing)} are not in `{place.name}/`, which is "
                "never uploaded: that their repair is kept cannot be checked."
            )
        names += [str(i) for i in numbers if i not in missing]
    return [RememberedTrigger(load_trigger(inside(place, name))) for name in names]


def what_they_do(
    encoder: Encoder, remembered: Sequence[RememberedTrigger], inputs: Sequence[RawInput]
) -> list[float | None]:
    """Mean cosine of stamped with clean features for each trigger; `None` for those of another modality."""
    clean = encoder.encode(inputs)
    return [
        round(float((encoder.encode([encoder.stamp(e.trigger, x) for x in inputs]) * clean).sum(dim=1).mean()), 4)
        if e.trigger.modality == encoder.modality
        else None
        for e in remembered
    ]


def report_earlier_repairs(remembered: Sequence[RememberedTrigger]) -> None:
    """Log what became of earlier repairs; a warning for one that got worse by more than 0.02."""
    for earlier in remembered:
        before, after = earlier.cosine_before, earlier.cosine_after
        if before is None or after is None:
            continue
        message = (
            f"Trigger repaired earlier ({earlier.trigger.describe()}): cosine of stamped with clean features {before:.3f} "
            f"before this run, {after:.3f} after it"
        )
        if after < before - _TOLERANCE:
            logger.warning(f"{message}. This run undid a part of that repair; raise `generalizability_weight`.")
        else:
            logger.info(f"{message}.")
