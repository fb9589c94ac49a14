# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""The reports of a run: checked, their triggers found, and a verdict on each before any weight changes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from .bug_instance import BugInstance
from .clean_inputs import CleanInputs
from .config import MudjackingConfig
from .encoder import Encoder
from .inversion import UnverifiedTriggerError, invert_trigger
from .preprocessing import Modality, RawInput
from .processes import done_by_all, rank_and_count
from .screening import Screening, judge
from .triggers import Trigger


logger = logging.getLogger(__name__)

# What helps against some of the verdicts.
_ADVICE = {
    "natural": "To patch on a candidate with little evidence lower `min_evidence` (`--min-evidence`); ",
    "wrong pair": "Give another reference: an input of the true class of x_b, which the model gets right; ",
}
# Clean images, besides those that triggers are verified on, that show what pictures look like.
OTHER_INPUTS = 1024


def verification_inputs(clean_inputs: CleanInputs, count: int, seed: int) -> tuple[list[RawInput], Sequence[RawInput]]:
    """Clean inputs to verify triggers on, and others, which nothing is verified on, as far as there are enough.

    The others are many, and read when they are used.
    """
    sample = clean_inputs.sample(count + OTHER_INPUTS, seed)
    inputs, others = list(sample[:count]), sample[count:]
    return inputs, others if len(others) >= len(inputs) else sample


@dataclass
class InvertedReports:
    """What the pre-step found.

    Args:
        kept (`list[Screening]`): Verdicts on the reports that are repaired.
        screenings (`list[Screening]`): Verdicts on all reports.
        skipped (`list[int]`): Numbers of the reports that are left out.
        forwards (`int`): Inputs that went through the model.
    """

    kept: list[Screening] = field(default_factory=list)
    screenings: list[Screening] = field(default_factory=list)
    skipped: list[int] = field(default_factory=list)
    forwards: int = 0

    @property
    def triggers(self) -> list[Trigger | None]:
        """One for each report that is repaired; `None` for one whose best candidate is not verified."""
        return [screening.found.trigger if screening.verified else None for screening in self.kept]


def invert_reports(
    encoder: Encoder,
    reports: Sequence[BugInstance],
    clean_inputs: CleanInputs,
    args: MudjackingConfig,
    disable_tqdm: bool,
) -> InvertedReports:
    """Find the trigger in each report and judge the report, as `args` has it; every process of the run must call it.

    Where there are as many reports as processes, each process takes some; else the forward passes of each report are shared.
    All processes get the same result.

    Raises:
        ValueError: If a report's inputs already agree.
        UnverifiedTriggerError: If the verdict on any report or, with `on_unverified="skip"`, on all is another than
            `"trigger"`; never with `"patch"`.
    """
    inputs, others = verification_inputs(clean_inputs, args.inversion_inputs, args.seed)

    def screened(bug: BugInstance) -> Screening:
        found = invert_trigger(
            encoder,
            bug,
            inputs,
            other_inputs=others,
            max_area=args.max_trigger_area,
            seed=args.seed,
            disable_tqdm=disable_tqdm,
        )
        return judge(encoder, bug, found, inputs, args.min_evidence)

    result = InvertedReports()
    for number, (bug, screening) in enumerate(zip(reports, _each_screened(encoder, reports, screened), strict=True)):
        result.forwards += screening.found.forwards + screening.forwards
        result.screenings.append(screening)
        if screening.verdict == "trigger":
            found = screening.found
            logger.info(f"Trigger of `{bug.name}`: transfer {found.score:.3f}, {found.trigger.describe()}.")
        elif _is_left_out(bug, screening, args.on_unverified, last=len(result.skipped) + 1 == len(reports)):
            result.skipped.append(number)
            continue
        result.kept.append(screening)
    return result


def _each_screened(
    encoder: Encoder, reports: Sequence[BugInstance], screened: Callable[[BugInstance], Screening]
) -> Iterator[Screening]:
    """The verdict on each report, in their order, by the processes of the run."""
    rank, count = rank_and_count()
    if len(reports) < count or count == 1:
        for bug in reports:
            with encoder.over_processes():
                screening = screened(bug)
            yield screening
        return
    shares = done_by_all(lambda: [screened(bug) for bug in reports[rank::count]])
    yield from (shares[number % count][number // count] for number in range(len(reports)))


def _is_left_out(bug: BugInstance, screening: Screening, on_unverified: str, last: bool) -> bool:
    """Refuse a report that is not believed, or say whether it is left out; the last one cannot be."""
    reason = f"{screening.headline(bug)} {' '.join(screening.reasons)}"
    skip = on_unverified == "skip"
    nothing_left = skip and last
    if on_unverified == "refuse" or nothing_left:
        raise UnverifiedTriggerError(
            f"{reason}{' No report is left.' if nothing_left else ''} {_ADVICE.get(screening.verdict, '')}`on_unverified` "
            "(`--on-unverified`) says what else may become of such a report; a trigger that is known can be given in Python "
            "(`triggers`)."
        )
    repaired = "repaired, trigger and pair" if screening.verified else "repaired without a trigger"
    logger.warning(f"{reason} It is {'left out' if skip else repaired}.")
    return skip


def checked_reports(bug_instances: Sequence[BugInstance] | None) -> list[BugInstance]:
    """The reports of one run.

    Raises:
        TypeError: If it is no list of `BugInstance` objects of one kind.
        ValueError: If there is none.
    """
    if isinstance(bug_instances, BugInstance):
        raise TypeError("`bug_instances` is a single `BugInstance`; pass a list: `bug_instances=[bug]`.")
    if not bug_instances:
        raise ValueError("There are no `bug_instances`. Pass at least one `BugInstance(misclassified, reference)`.")
    for bug in bug_instances:
        if not isinstance(bug, BugInstance):
            raise TypeError(f"`bug_instances` holds a `{type(bug).__name__}`; `BugInstance` objects are needed.")
    if len({bug.modality for bug in bug_instances}) > 1:
        raise TypeError("`bug_instances` holds images and texts; patch one tower after the other, in two runs.")
    return list(bug_instances)


def checked_triggers(triggers: Sequence[Trigger], count: int, modality: Modality) -> list[Trigger]:
    """Known triggers, one for each of `count` reports.

    Raises:
        TypeError: If it is no list of `Trigger` objects for `modality`.
        ValueError: If their number is another.
    """
    if not isinstance(triggers, (list, tuple)):
        raise TypeError(
            f"`triggers` is a single `{type(triggers).__name__}`; pass a list with one for each bug instance."
        )
    for trigger in triggers:
        if not isinstance(trigger, Trigger):
            raise TypeError(f"`triggers` holds a `{type(trigger).__name__}`; `Trigger` objects are needed.")
        if trigger.modality != modality:
            raise TypeError(f"`triggers` holds one of kind `{trigger.kind}`, but the model takes {modality}s.")
    if len(triggers) != count:
        raise ValueError(f"There are {len(triggers)} triggers for {count} bug instances; pass one for each.")
    return list(triggers)
