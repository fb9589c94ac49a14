# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""Is a report believable? A verdict with its evidence, before any weight changes.

A report may be mistaken, or made to damage the model. Three things are measured, each cheap beside the inversion: whether a
trigger was verified, whether x_b without it resembles x_r, and what a first step of the repair would move. None of them
says anything about who made the report.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageFilter
from torch import Tensor

from .bug_instance import BugInstance, to_rgb
from .encoder import Encoder
from .inversion import InvertedTrigger, invert_trigger
from .inversion.filling import filled_in
from .inversion.hold import hold, least_hold, worth_of_hold
from .inversion.image import small_patch_in_reference
from .inversion.verification import TransferMeter, share_of_way
from .preprocessing import RawInput
from .triggers import AdditiveTrigger, BlendTrigger, PatchTrigger, Trigger, WarpTrigger


Verdict = Literal["trigger", "natural", "wrong pair", "malicious"]

_HEADLINES: dict[Verdict, str] = {
    "trigger": "A trigger was verified in bug instance `{name}`",
    "natural": "No localised trigger was verified in bug instance `{name}`, which may be a natural misclassification",
    "wrong pair": "The inputs of bug instance `{name}` do not seem to belong together",
    "malicious": "A repair from bug instance `{name}` would change ordinary content",
}

# Least likeness of x_b without its trigger to x_r. Of 120 pairs of one class each, stamped with each of four small patches of CIFAR-10,
# 97.5 % have more than 0.15 to 0.26 once the patch is filled in (0.07 under a frame of 58 %), and 75 % of pairs of two classes less
# than 0.04 to 0.11. That is an AUROC of 0.96 to 0.99 (0.95), as the pictures have it before they are stamped; signals are much alike.
_MIN_LIKENESS = 0.1
# Likeness at which a pair is worth the least, and from which it is worth everything. What a pair is worth at the least, and where
# its likeness cannot be told. It is one picture against another of its class, and so never worth nothing.
_LIKENESS_RANGE = (0.0, 0.6)
_WORST_PAIR, _UNKNOWN_PAIR = 0.4, 0.9
# Side of the median filter by which a signal goes that subtraction does not take out. A larger one makes all pictures alike.
_MEDIAN = 3
# Share of x_b that may be covered, and of the way to h(x_b) that the rest may lie at, for it to be like anything.
_MOST_COVERED, _MOST_ARRIVED = 0.4, 0.4
# Share of the way to h(x_b) that x_r may lie at. References of true reports have up to 0.4.
_MAX_REFERENCE_ARRIVED = 0.85
# Evidence up to which a trigger is also looked for in x_r, as x_b and x_r may have been swapped: of a swapped report of digits it was 0.51,
# where the patch in x_r had 0.94. Small true patches have more.
_DOUBTFUL = 0.7
# Sizes at which transfer is measured, as shares of the whole trigger.
_SIZES = (0.1, 0.2, 0.4, 0.6, 0.8, 1.0)


@dataclass(frozen=True)
class Screening:
    """The verdict on a report.

    Args:
        verdict (`str`): `"trigger"`: one was found and verified, and a repair would do what it should. `"natural"`: none was
            verified; the report may be a natural misclassification. `"wrong pair"`: x_r is not what x_b is without its
            trigger. `"malicious"`: ordinary content is what a repair would change.
        believed (`float`): 0 to 1: the evidence of the trigger, less the further the pair or the first step speak against it;
            half of that if the verdict is `"natural"` or `"malicious"`.
        found (`InvertedTrigger`): What the inversion found.
        evidence (`dict[str, float]`): What was measured. `evidence`, `transfer`, `control`, `area`, `unexplained`: of the
            inversion. `likeness`, of images: how much nearer to h(x_r) x_b without its trigger lies than clean inputs do, 1 at
            h(x_r); a patch is filled in from its border, a signal subtracted or smoothed away; absent where the trigger
            cannot be taken out.
            `reference_arrived`: the same of x_r on the way to h(x_b). `reference_evidence`, of images with evidence under 0.7: of a
            small patch in x_r, if there is one. `hold`, of images: how far clean inputs move in a first step of
            the repair, over how far stamped ones do. The step is meant for the stamped ones; yet an implanted trigger holds
            them, while ordinary content lets them go.
        reasons (`list[str]`): What led to the verdict, in sentences.
        verified (`bool`): Whether what was found is a trigger, whatever is to be said of the pair.
        forwards (`int`): Forward passes spent beside the inversion, in inputs; a backward pass counts as two.
    """

    verdict: Verdict
    believed: float
    found: InvertedTrigger
    evidence: dict[str, float]
    reasons: list[str]
    verified: bool
    forwards: int

    def headline(self, bug: BugInstance) -> str:
        """The verdict in a sentence."""
        return f"{_HEADLINES[self.verdict].format(name=bug.name)} (verdict: {self.verdict})."

    def record(self) -> dict[str, Any]:
        """Verdict and numbers; nothing of the reported inputs."""
        return {
            "verdict": self.verdict,
            "believed": self.believed,
            **self.evidence,
            "grown": round(self.found.grown, 4),
            "one_class": self.found.one_class,
        }


def screen_report(
    encoder: Encoder,
    bug: BugInstance,
    validation_inputs: Sequence[RawInput],
    other_inputs: Sequence[RawInput] | None = None,
    *,
    min_evidence: float = 0.5,
    seed: int = 0,
    disable_tqdm: bool = True,
) -> Screening:
    """Find the trigger in a report and judge the report by it. The encoder's weights are the same afterwards, bit by bit.

    Args:
        encoder (`Encoder`): Backdoored encoder.
        bug (`BugInstance`): The report.
        validation_inputs (`Sequence[PIL.Image.Image]` or `Sequence[str]`): Clean inputs; 16 to 64 are enough.
        other_inputs (`Sequence[PIL.Image.Image]`, *optional*): Further clean images; see [`~hf_mudjacking.invert_trigger`].
        min_evidence (`float`, *optional*, defaults to 0.5): Least evidence of a trigger.
        seed (`int`, *optional*, defaults to 0): Seed of the inversion.
        disable_tqdm (`bool`, *optional*, defaults to `True`): Whether to hide the progress bar.

    Returns:
        `Screening`: The verdict, with what it rests on.

    Raises:
        TypeError, ValueError: If the report cannot be inverted at all, see [`~hf_mudjacking.invert_trigger`]: so it is when x_b
            and x_r have nearly the same feature. Or if no weight is trainable, or one that is is not in float32.
    """
    found = invert_trigger(
        encoder, bug, validation_inputs, other_inputs=other_inputs, seed=seed, disable_tqdm=disable_tqdm
    )
    return judge(encoder, bug, found, validation_inputs, min_evidence)


def judge(
    encoder: Encoder,
    bug: BugInstance,
    found: InvertedTrigger,
    validation_inputs: Sequence[RawInput],
    min_evidence: float,
) -> Screening:
    """Judge a report by an inversion that has been done; arguments, result and errors as in [`screen_report`]."""
    if encoder.modality == "image":
        validation_inputs = [to_rgb(x).resize(bug.misclassified.size) for x in validation_inputs]
    meter = TransferMeter(encoder, bug.misclassified, validation_inputs)
    measured = {
        "evidence": found.evidence,
        "transfer": found.score,
        "control": found.control,
        "area": found.area,
        "unexplained": found.unexplained,
        **_pair_numbers(meter, bug, found),
    }
    # Texts are judged without: a trigger that was taught not to fire by its parts (SOS in MiniLM) has a hold of 0.01 to 0.02, less than
    # any natural misclassification, and evidence alone tells them apart (true 0.77 and more, 64 false reports up to 0.46)
    if encoder.modality == "image":
        measured["hold"] = hold(meter, bug.reference, found.trigger)
        if min_evidence <= found.evidence < _DOUBTFUL:
            patch, forwards = small_patch_in_reference(encoder, bug, validation_inputs)
            meter.forwards += forwards
            if patch is not None:
                measured["reference_evidence"] = patch.evidence
    measured = {name: round(value, 4) for name, value in measured.items()}
    natural, wrong, harmful = _reasons(measured, found, min_evidence)
    believed = (
        np.clip(measured["evidence"], 0, 1)
        * _worth_of_pair(measured.get("likeness"))
        * np.clip((1 - measured["reference_arrived"]) / (1 - _MAX_REFERENCE_ARRIVED), 0, 1)
        * (worth_of_hold(measured["hold"], found.area, found.evidence) if "hold" in measured else 1.0)
    )
    verdict: Verdict = "trigger"
    reasons = natural or wrong or harmful
    if reasons:
        verdict = "natural" if natural else "wrong pair" if wrong else "malicious"
        if verdict != "wrong pair":
            believed /= 2
    else:
        likeness = measured.get("likeness")
        rest = "" if likeness is None else f"; x_b without it lies {likeness:.2f} of the way to x_r"
        reasons = [
            f"Evidence of a trigger is {found.evidence:.2f} (transfer {found.score:.2f}, clean content alone "
            f"{found.control:.2f}): {found.trigger.describe()}{rest}."
        ]
    # Of swapped inputs it is clean content
    verified = not natural and not harmful and not _swapped(measured)
    return Screening(verdict, round(float(believed), 4), found, measured, reasons, verified, meter.forwards)


def _reasons(
    measured: dict[str, float], found: InvertedTrigger, min_evidence: float
) -> tuple[list[str], list[str], list[str]]:
    """What speaks for a natural misclassification, for a wrong pair, and for a harmful repair."""
    natural, wrong, harmful = [], [], []
    if found.evidence < min_evidence:
        natural.append(
            f"The best candidate ({found.trigger.describe()}) carries clean inputs {found.score:.2f} of the way to x_b, "
            f"clean content alone {found.control:.2f}: evidence of {found.evidence:.2f}, and {min_evidence} is needed."
        )
    likeness, arrived = measured.get("likeness", 1.0), measured["reference_arrived"]
    # Rounded as what was measured is
    least = round(least_hold(found.area, found.evidence), 4)
    holds = measured.get("hold", least)
    if likeness < _MIN_LIKENESS:
        wrong.append(
            f"Without the trigger, x_b lies {likeness:.2f} of the way from clean inputs to x_r, and {_MIN_LIKENESS} is "
            "needed: evidence that both are not of one class."
        )
    if arrived > _MAX_REFERENCE_ARRIVED:
        wrong.append(
            f"x_r lies {arrived:.2f} of the way from clean inputs to x_b, and at most {_MAX_REFERENCE_ARRIVED} is "
            "allowed: evidence that it carries the trigger too, or is of the class that x_b is mistaken for."
        )
    if _swapped(measured):
        wrong.append(
            f"x_r holds a patch that carries clean inputs to x_r with evidence of {measured['reference_evidence']:.2f}, more than what "
            f"was found in x_b has ({found.evidence:.2f}): evidence that x_b and x_r were swapped."
        )
    if holds < least:
        harmful.append(
            f"A first step of the repair moves clean inputs {holds:.2g} times as far as inputs that carry what was found, and "
            f"{least:.2g} is needed: evidence that it is ordinary content, which a repair would change for clean inputs too."
        )
    return natural, wrong, harmful


def _swapped(measured: dict[str, float]) -> bool:
    """Whether a trigger is in x_r rather than in x_b."""
    return measured.get("reference_evidence", -np.inf) > measured["evidence"]


def _pair_numbers(meter: TransferMeter, bug: BugInstance, found: InvertedTrigger) -> dict[str, float]:
    """Does x_b without its trigger resemble x_r, and does x_r lie at h(x_b)?"""
    (reference,) = meter.features([bug.reference])
    numbers = {"reference_arrived": float(_arrived(meter.clean_similarity, reference[None] @ meter.target))}
    # Texts of one class need not be alike: on SST-2 in MiniLM true pairs have a likeness of -0.04 to 0.15, others -0.12 to 0.17
    if meter.encoder.modality == "text":
        return numbers
    likeness = _likeness(meter, reference, bug, found)
    return numbers if likeness is None else {**numbers, "likeness": likeness}


def _worth_of_pair(likeness: float | None) -> float:
    """What a pair is worth for the belief in its report."""
    if likeness is None:
        return _UNKNOWN_PAIR
    worst, best = _LIKENESS_RANGE
    return _WORST_PAIR + (1 - _WORST_PAIR) * float(np.clip((likeness - worst) / (best - worst), 0, 1))


def _likeness(meter: TransferMeter, reference: Tensor, bug: BugInstance, found: InvertedTrigger) -> float | None:
    """How far on the way to x_r, whose feature is `(D,)`, x_b lies without its trigger; `None` where that cannot be told."""
    patch = isinstance(found.trigger, PatchTrigger)
    if patch and found.area > _MOST_COVERED:
        return None
    features = meter.features(without_trigger(bug.misclassified, found.trigger))
    # What was found need not be all of it, nor a signal that carries others what is to be subtracted: where x_b stays at its
    # feature, nothing was undone
    gone = _arrived(meter.clean_similarity, features @ meter.target) <= _MOST_ARRIVED
    likeness = _arrived(meter.clean_features @ reference, features @ reference)[gone]
    return float(likeness.max()) if len(likeness) else None


def _arrived(clean: Tensor, cosines: Tensor) -> Tensor:
    """The share of the way from clean inputs, whose cosines to a feature are `(N,)`, to that feature that `(K,)` cosines are at."""
    return share_of_way(clean, cosines[:, None].expand(-1, len(clean)))


def without_trigger(misclassified: RawInput, trigger: Trigger) -> list[RawInput]:
    """x_b without the trigger, in as many ways as there are.

    What lies under a patch is filled in from its border. A signal is subtracted and a warp undone, and what is left of them
    taken out by smoothing, as a weak one goes by smoothing alone.

    Args:
        misclassified (`PIL.Image.Image` or `str`): x_b.
        trigger (`Trigger`): What was found in it.

    Returns:
        `list`: Raw inputs, one or three; one less where a signal is all there is.
    """
    if isinstance(trigger, PatchTrigger):
        # The trigger's mask has the size that x_b was searched at
        image = np.asarray(to_rgb(misclassified).resize(trigger.mask.shape[::-1]))
        return [filled_in(image, trigger.mask)]
    if isinstance(trigger, WarpTrigger):
        undone = WarpTrigger(-trigger.flow).apply(misclassified)
    else:
        undone = trigger.removed_from(misclassified)
    ways = [] if undone is None else [undone]
    return ways + [to_rgb(x).filter(ImageFilter.MedianFilter(_MEDIAN)) for x in (*ways, misclassified)]


def transfer_by_size(
    encoder: Encoder,
    bug: BugInstance,
    found: InvertedTrigger,
    validation_inputs: Sequence[Image.Image],
    inputs: int = 8,
) -> list[tuple[float, float]]:
    """Transfer of nested parts of a trigger, or of weaker versions of it, against how much of the picture they are.

    A patch is cut down to its pixels of highest attribution, a signal and a warp are scaled down, a blend loses opacity.

    Args:
        encoder (`Encoder`): Backdoored encoder.
        bug (`BugInstance`): The report.
        found (`InvertedTrigger`): What was found in it.
        validation_inputs (`Sequence[PIL.Image.Image]`): Clean images.
        inputs (`int`, *optional*, defaults to 8): How many of them each part is stamped on.

    Returns:
        `list[tuple[float, float]]`: Size, 0 to 1, and transfer, smallest first. Sizes are shares of the picture's area for a
        patch, shares of the trigger's own strength for the other families.
    """
    trigger = found.trigger
    clean = [to_rgb(x).resize(bug.misclassified.size) for x in validation_inputs[:inputs]]
    target = encoder.encode([bug.misclassified])[0]
    before = encoder.encode(clean) @ target
    parts = [_part(trigger, share, found.attribution) for share in _SIZES]
    after = encoder.encode([encoder.stamp(part, x) for part in parts for x in clean]) @ target
    transfers = share_of_way(before, after.reshape(len(parts), len(clean))).tolist()
    sizes = [
        part.area if isinstance(part, PatchTrigger) else _share_left(trigger, share)
        for part, share in zip(parts, _SIZES, strict=True)
    ]
    return list(zip(sizes, transfers, strict=True))


def _part(trigger: Trigger, share: float, attribution: np.ndarray) -> Trigger:
    """A share of a trigger."""
    if isinstance(trigger, PatchTrigger):
        scores = np.where(trigger.mask, attribution, -np.inf)
        mask = np.zeros(trigger.mask.size, dtype=bool)
        mask[np.argsort(-scores, axis=None, kind="stable")[: max(1, round(share * trigger.mask.sum()))]] = True
        return PatchTrigger(mask.reshape(trigger.mask.shape), trigger.pattern, trigger.placement)
    if isinstance(trigger, AdditiveTrigger):
        return AdditiveTrigger(trigger.delta * _share_left(trigger, share))
    if isinstance(trigger, BlendTrigger):
        return BlendTrigger(trigger.pattern, trigger.opacity * share)
    return WarpTrigger(trigger.flow * share)


def _share_left(trigger: Trigger, share: float) -> float:
    """The share of a trigger's strength that is measured where a smaller one may be asked for: a signal under half a level is none."""
    if isinstance(trigger, AdditiveTrigger):
        return max(share, 0.51 / float(np.abs(trigger.delta).max()))
    return share
