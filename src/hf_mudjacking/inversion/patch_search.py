# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""The patch in x_b: attribution suggests masks, transfer verifies them, growth and further parts complete them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from ..triggers import PatchTrigger
from .attribution import FULL_SCAN, QUICK_SCAN, Scan, coarse_to_fine
from .filling import filled_in
from .growth import changed, grow, grow_on, is_squared_off, odd, purify, squared_off, without_spurs
from .hold import doubt_left, hold_if_possible
from .result import AREA_PRICE, EXPLAINED, MIN_REACHABLE, UNEXPLAINED_PRICE, InvertedTrigger
from .splitting import apart, candidate_masks, distinct
from .verification import TransferMeter


# Share of the way that x_b may still lie at h(x_b) without a patch, if no trigger of another family is to be looked for.
COMPLETE = 0.4
# Area of a patch that is not mistaken for ordinary content, and with which nothing else is looked for.
SMALL = 0.2

# Area of what was found by its effect, from which it may be one end of a large patch. Of a frame over 58 % of the picture it was 12 %
# and more; what a small patch grows to in several rounds is content.
_LARGE_CORE = 0.1

# Largest part that is taken out of x_b to see what it is without.
_MOST_TAKEN_OUT = 0.25

# Candidates that differ by less than this IoU are one.
_SAME_MASK = 0.9
# Clean inputs on which the control is taken first, and how far from what is needed evidence is clear without the others.
_CONTROLLED_ON, _CLEARLY = 8, 0.25
# Share of a core's transfer that a purified seed, and what grows from it, must keep on a few inputs.
_KEPT_TRANSFER = 0.8
# What keeps this much of it there may have met one input on which it does nothing, and is tried on all, where it must keep more:
# white squares of 3×3 keep 0.70 to 0.78 on four inputs, one of which is white there, and 0.94 to 0.96 on 32; some of the
# colours of a pattern 0.58 to 0.83 and 0.75 to 0.90.
_IN_DOUBT, _KEPT_ON_ALL = 0.7, 0.9
# Growth is taken back if it covers more of the picture.
_MAX_GROWN = 0.8
# Transfer that squaring a mask off may change by.
_SAME_EFFECT = 0.1
# Of several grown masks the one from a purer seed, without spurs, is taken, unless it leaves this much more of x_b
# unexplained.
_ALIKE_LEFT = 0.1
# Share of the way from which further parts are looked for: of whole triggers mostly less than 0.3 is left, of one corner of four from
# 0.33.
_MORE_LEFT = 0.3
# Parts that are looked for beside the first at most.
_MORE_PARTS = 5
# Share of the first part's transfer that a further one must have, after its control and the price of its area: of four squares
# in the corners one fires fully, another with 0.42 to 0.79 and the others with less; ordinary content beside a whole trigger had 0.36.
_FURTHER_PART = 0.4
# What a part must explain of x_b, in shares of the way, to count although others are missing.
_PART_EXPLAINS = 0.2
# Share of the transfer that a patch must keep at other places to count as one that goes anywhere.
_KEPT_ELSEWHERE = 0.9


@dataclass(frozen=True)
class _Effort:
    """What a search spends.

    Args:
        scan (`Scan`): Windows of the attribution.
        rounds (`tuple`): Clean inputs that candidates are tried on in each round, and how many go on.
        compared_on (`int`): Clean inputs on which masks are compared with each other, or that only have to show a great effect;
            a score is taken on all.
    """

    scan: Scan
    rounds: tuple[tuple[int, int], ...]
    compared_on: int


_QUICK = _Effort(QUICK_SCAN, ((1, 4), (4, 1)), 4)
_THOROUGH = _Effort(FULL_SCAN, ((2, 8), (8, 1)), 8)


@dataclass(frozen=True)
class _Part:
    """A patch: what was found of it by its effect, what that grew to, its transfer, and the map that suggested it."""

    core: np.ndarray
    mask: np.ndarray
    transfer: float
    attribution: np.ndarray


def find_patch(
    meter: TransferMeter,
    control_meter: TransferMeter,
    max_area: float,
    seed: int,
    bar: tqdm,
    in_parts: bool = True,
    reference: Tensor | None = None,
) -> InvertedTrigger:
    """Find the patch in x_b.

    1. Occlusion attribution of 1 - cos(h(x), h(x_r)) with windows of several sizes.
    2. From each map: the two-cluster split and level sets.
    3. Verification: each candidate is stamped on clean inputs; the best is the one that carries features furthest
       towards h(x_b) for its size.
    4. Growth to the parts that look the same but are not needed to fire, verified again.
    5. If that explains nothing, the same with attribution of cos(h(x), h(x_b)), for a small patch.
    6. If x_b without it still lies at h(x_b), there is more of it: attribution as in step 5 with what was found filled in.
    7. Does it work anywhere, or only where it is?

    A quick search, with fewer windows and fewer inputs to compare on, comes first. On 36 reports of six local patches on a
    CIFAR-10 ResNet it gave as good masks for half of the forwards; of triggers in several parts it finds less, which is
    why a small patch that explains x_b alone is all that is believed of it.

    Args:
        meter, control_meter (`TransferMeter`): Of x_b, and of x_r, whose own content says what clean content does.
        max_area (`float`): Largest share of the picture that a candidate may cover.
        seed (`int`): Seed of the growth.
        bar (`tqdm`): Progress bar; its total grows by the stages of the search.
        in_parts (`bool`, *optional*, defaults to `True`): Whether step 6 is taken.
        reference (`FloatTensor` of shape `(D,)`, *optional*): What x_b would be without the trigger; h(x_r) when absent.

    Returns:
        `InvertedTrigger`: The patch, whose `evidence` says whether it is one.
    """
    alone = _PatchSearch(meter, control_meter, max_area, seed, bar, _QUICK, reference).found_alone()
    return alone or _PatchSearch(meter, control_meter, max_area, seed, bar, _THOROUGH, reference).found(in_parts)


def find_small_patch(meter: TransferMeter, control_meter: TransferMeter) -> InvertedTrigger | None:
    """A small patch in x_b that explains it by itself, by the quick search alone; see [`find_patch`]."""
    return _PatchSearch(meter, control_meter, SMALL, 0, tqdm(total=0, disable=True), _QUICK).found_alone()


def without_what_leads_there(meter: TransferMeter, control_meter: TransferMeter) -> Tensor:
    """The feature `(D,)` of x_b with a part filled in, without which least of the way to h(x_b) is left for what is covered."""
    return _PatchSearch(meter, control_meter, _MOST_TAKEN_OUT, 0, tqdm(total=0, disable=True), _THOROUGH).clean_self()


def proof(core: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """What evidence is about: what was found by its effect or, where that shrank, the whole of a patch."""
    return core if core.sum() < mask.sum() else mask


class _PatchSearch:
    def __init__(
        self,
        meter: TransferMeter,
        control_meter: TransferMeter,
        max_area: float,
        seed: int,
        bar: tqdm,
        effort: _Effort,
        reference: Tensor | None = None,
    ) -> None:
        self.meter, self.control_meter = meter, control_meter
        self.max_area, self.seed, self.bar, self.effort = max_area, seed, bar, effort
        self.reference = control_meter.target if reference is None else reference
        self.image = np.asarray(meter.misclassified)
        self.clean = np.stack([np.asarray(x) for x in meter.validation_inputs])
        # The mean clean picture hides a window without adding anything that clean inputs do not have there.
        self.baseline = self.clean.mean(axis=0).round().astype(np.uint8)
        self.controlled = control_meter.reachable >= MIN_REACHABLE
        # What was measured of masks, by their bytes
        self.lefts: dict[bytes, float] = {}
        self.transfers: dict[bytes, float] = {}

    def found_alone(self) -> InvertedTrigger | None:
        """A small patch that explains x_b by itself, if that is what attribution from x_r shows."""
        part = self._part(np.zeros(self.image.shape[:2], dtype=bool), self._distance_to_reference)
        if part.mask.mean() > SMALL:
            return None
        control, evidence = self._evidence(part)
        left = self._left_without(part.mask)
        if evidence < EXPLAINED or left > _MORE_LEFT:
            return None
        return self._result(part, part.mask, control, evidence, left)

    def found(self, in_parts: bool) -> InvertedTrigger:
        """The patch, in as many parts as it has or only the first."""
        nothing = np.zeros(self.image.shape[:2], dtype=bool)
        part = self._part(nothing, self._distance_to_reference)
        control, evidence = self._evidence(part)
        if evidence < EXPLAINED:
            # A reference that is unlike x_b's clean self leads attribution astray
            other = self._part(nothing, self._nearness_to_target)
            other_control, other_evidence = self._evidence(other)
            # What leads to h(x_b) is also ordinary content: of that it takes much, which lets go, of a trigger that was overlooked little
            if other_evidence >= EXPLAINED and (other.mask.mean() <= SMALL or self._holds(other.mask)):
                part, control, evidence = other, other_control, other_evidence
        mask, left = part.mask, self._left_without(part.mask)
        if in_parts and evidence >= EXPLAINED:
            mask, left = self._with_further_parts(part, left)
        return self._result(part, mask, control, evidence, left)

    def _holds(self, mask: np.ndarray) -> bool:
        """Whether a mask holds inputs as nothing but a trigger does."""
        trigger = PatchTrigger.from_image(self.meter.misclassified, mask)
        held = hold_if_possible(self.meter, self.control_meter.misclassified, trigger)
        return held is not None and doubt_left(held, trigger.area) == 0.0

    def clean_self(self) -> Tensor:
        """The feature of x_b without what leads it to h(x_b)."""
        maps = coarse_to_fine(
            self._distance_to_reference, self.image, self.baseline, self.effort.scan, self.bar.update
        )
        masks = distinct([mask for scores in maps for mask in candidate_masks(scores, self.max_area)], max_area=1.0)
        owed = [self._left_without(mask) + AREA_PRICE * float(mask.mean()) for mask in masks]
        best = masks[int(np.argmin(owed))] if masks else np.zeros(self.image.shape[:2], dtype=bool)
        return self._features(np.asarray(filled_in(self.image, best))[None])[0]

    def _result(self, part: _Part, mask: np.ndarray, control: float, evidence: float, left: float) -> InvertedTrigger:
        trigger = PatchTrigger.from_image(self.meter.misclassified, mask)
        if trigger.area <= SMALL:
            elsewhere = PatchTrigger.from_image(self.meter.misclassified, mask, "anywhere")
            if self.meter.transfer([elsewhere], self.effort.compared_on)[0] >= _KEPT_ELSEWHERE * part.transfer > 0:
                trigger = elsewhere
        return InvertedTrigger(
            trigger, part.transfer, control, evidence, trigger.area, part.attribution, part.core,
            self.meter.forwards + self.control_meter.forwards, unexplained=left,
        )  # fmt: skip

    def _evidence(self, part: _Part) -> tuple[float, float]:
        """Control and evidence of the first part.

        Its size is that of what was found by its effect: the rest is there by its looks. On digits, reports of clean pairs
        reach a transfer of 0.8, but hardly more than their control.
        """
        return self._beyond_control(part.transfer, proof(part.core, part.mask), EXPLAINED)

    def _beyond_control(self, transfer: float, mask: np.ndarray, needed: float) -> tuple[float, float]:
        """Control of a mask, what as much of x_r in its place carries towards h(x_r), and what is left of a transfer after it.

        A third of any picture carries others a good way: what a mask carries beyond that, and beyond its price, is a trigger's.
        Where that is far from what is needed, the control of a few inputs will do.
        """
        worth = transfer - AREA_PRICE * float(mask.mean())
        if not self.controlled:
            return 0.0, worth
        for count in (_CONTROLLED_ON, None):
            control = float(self.control_meter.transfer_of_masks([mask], count)[0])
            evidence = worth - max(control, 0.0)
            if abs(evidence - needed) > _CLEARLY:
                break
        return control, evidence

    def _with_further_parts(self, first: _Part, left: float) -> tuple[np.ndarray, float]:
        """The mask of as many parts as explain x_b, and what is left of x_b without them."""
        unions, lefts = [first.mask], [left]
        while lefts[-1] > _MORE_LEFT and len(unions) <= _MORE_PARTS:
            more = self._further_part(unions[-1], _FURTHER_PART * first.transfer)
            if more is None:
                break
            unions.append(unions[-1] | more)
            lefts.append(self._left_without(unions[-1]))
        if lefts[-1] <= _MORE_LEFT:
            return unions[-1], lefts[-1]
        # They do not explain x_b together: as many as are worth what they cover
        owed = [
            AREA_PRICE * float(mask.mean()) + UNEXPLAINED_PRICE * rest
            for mask, rest in zip(unions, lefts, strict=True)
        ]
        count = int(np.argmin(owed))
        # But one that fires by itself, and without which x_b is clearly less at h(x_b), is a part whatever it covers: it took 54 %
        # of the picture to bring a frame from 0.98 to 0.67
        while count + 1 < len(unions) and lefts[count] - lefts[count + 1] >= _PART_EXPLAINS:
            count += 1
        return unions[count], lefts[count]

    def _further_part(self, covered: np.ndarray, least: float) -> np.ndarray | None:
        """The mask of one more part, as it grew or else as its effect showed it, if it fires by itself."""
        # x_b without its first part is somewhere between: what still leads to h(x_b) says more than what leads away from x_r
        part = self._part(covered, self._nearness_to_target)
        # What grew too large may have a core that did not
        room = _MAX_GROWN - float(covered.mean())
        for mask in distinct([part.mask & ~covered, part.core & ~covered], max_area=room):
            if self._beyond_control(self._transfer_on_all(mask), mask, least)[1] >= least:
                return mask
        return None

    def _part(self, covered: np.ndarray, score: Callable[[np.ndarray], Tensor]) -> _Part:
        """The best patch outside of what is covered, where occlusion lowers a score."""
        visible = np.asarray(filled_in(self.image, covered)) if covered.any() else self.image
        self.bar.total += len(self.effort.scan.shares) + 1
        maps = coarse_to_fine(score, visible, self.baseline, self.effort.scan, self.bar.update)
        core, source = self._best_candidate(maps, covered)
        pure = purify(core, self.image, self.clean, lambda masks: (mask for mask, _ in self._kept(core, masks)))
        # Of a trigger of many colours one may suffice to fire, and is then all that is pure
        seeds = distinct([pure, changed(core, self.image, self.clean)], max_area=1.0)
        grown = [grow(each, core, self.image, self.clean, self.seed) for each in seeds]
        if self.effort is _THOROUGH and core.mean() > _LARGE_CORE:
            # Of a large patch this may be one end: what is odd in it is purer, and leads further in several rounds
            seeds = distinct([odd(core, self.image, self.clean, self.seed), *grown], max_area=_MAX_GROWN)
            grown += [grow_on(each, self.image, self.clean, self.seed) for each in seeds]
        tidied = [option for each in grown for option in (without_spurs(each), each)]
        options = distinct(tidied, max_area=_MAX_GROWN)
        # The core, which is a window's shape, may hold content that carries clean inputs too
        kept = list(self._kept(core, options))
        mask = core
        if kept:
            left = [self._left_without(covered | option) for option, _ in kept]
            mask, transfer = kept[int(np.argmax([value <= min(left) + _ALIKE_LEFT for value in left]))]
            rough = [each for each in grown if not (mask & ~each).any()]
            mask = self._squared_off(mask, transfer, rough)
        self.bar.update()
        return _Part(core, mask, self._transfer_on_all(mask), maps[source])

    def _kept(self, core: np.ndarray, masks: Sequence[np.ndarray]) -> Iterator[tuple[np.ndarray, float]]:
        """The masks that keep enough of a core's transfer, in turn, and their transfer on a few inputs."""
        of_core, *few = map(float, self.meter.transfer_of_masks([core, *masks], self.effort.compared_on))
        for mask, transfer in zip(masks, few, strict=True):
            keeps = transfer >= _KEPT_TRANSFER * of_core > 0
            if not keeps and transfer >= _IN_DOUBT * of_core > 0:
                keeps = self._transfer_on_all(mask) >= _KEPT_ON_ALL * self._transfer_on_all(core)
            if keeps:
                yield mask, transfer

    def _transfer_on_all(self, mask: np.ndarray) -> float:
        """Transfer of a mask on all validation inputs."""
        known = mask.tobytes()
        if known not in self.transfers:
            self.transfers[known] = float(self.meter.transfer_of_masks([mask])[0])
        return self.transfers[known]

    def _distance_to_reference(self, batch: np.ndarray) -> Tensor:
        return 1 - self._features(batch) @ self.reference

    def _nearness_to_target(self, batch: np.ndarray) -> Tensor:
        return self._features(batch) @ self.meter.target

    def _features(self, batch: np.ndarray) -> Tensor:
        return self.meter.features([Image.fromarray(pixels) for pixels in batch])

    def _best_candidate(self, maps: Sequence[np.ndarray], covered: np.ndarray) -> tuple[np.ndarray, int]:
        """The candidate with the best transfer for its size, and the index of the map it came from.

        Beside a part that is covered it is the transfer above the control: what fires less than the first part would be
        drowned by large masks, which carry others by themselves.
        """
        source = {}
        for i, scores in enumerate(maps):
            for mask in candidate_masks(np.where(covered, scores.min(), scores), self.max_area):
                source.setdefault(mask.tobytes(), (mask, i))
        if not source:
            # Nothing in x_b makes a difference: the least bad guess is verified like any other and scores low.
            count = max(1, int(min(0.1, self.max_area) * maps[0].size))
            middle = np.zeros(maps[0].shape, dtype=bool)
            middle.flat[np.argsort(-maps[0], axis=None, kind="stable")[:count]] = True
            return middle, 0
        masks, origins = zip(*source.values(), strict=True)
        areas = np.array([mask.mean() for mask in masks])
        remaining = np.array(apart(masks, _SAME_MASK))
        for inputs, go_on in self.effort.rounds:
            tried = [masks[i] for i in remaining]
            merit = self.meter.transfer_of_masks(tried, inputs) - AREA_PRICE * areas[remaining]
            if covered.any() and self.controlled:
                merit -= np.maximum(self.control_meter.transfer_of_masks(tried, inputs), 0.0)
            remaining = remaining[np.argsort(-merit, kind="stable")[:go_on]]
        return masks[remaining[0]], origins[remaining[0]]

    def _squared_off(self, mask: np.ndarray, transfer: float, rough: Sequence[np.ndarray]) -> np.ndarray:
        """The mask squared off, or what it was before its spurs went, if its effect, `transfer`, stays what it is.

        What is added for its looks must not be what carries others: a third of a picture grows into one that does. And what has
        straight edges everywhere needs none from before. Where some of the colours of a pattern fire by themselves, what grew from
        them is ragged, and what grew from all of them may be a rectangle as it is.
        """
        if is_squared_off(mask):
            return mask
        pairs = [(form, squared_off(form, self.image)) for form in (*rough, mask)]
        filled = [squared for form, squared in pairs if not np.array_equal(squared, form)]
        for form in (*filled, *filter(is_squared_off, rough)):
            (after,) = self.meter.transfer_of_masks([form], self.effort.compared_on)
            if abs(after - transfer) <= _SAME_EFFECT and form.mean() <= _MAX_GROWN:
                return form
        return mask

    def _left_without(self, mask: np.ndarray) -> float:
        """How far x_b still lies on the way to its feature when some pixels are filled in: 0 if those were all that led there.

        They are filled in from their border: in any other content a patch leaves its outline, which a backdoor may take for the
        patch, and where a part of it is left the filling is like it. The way begins at clean inputs or, where that is nearer, at
        x_r: x_b without its trigger need not be further off than it.
        """
        known = mask.tobytes()
        if known not in self.lefts:
            target = self.meter.target
            before = max(float(self.meter.clean_similarity.mean()), float(self.control_meter.target @ target))
            rest = before if mask.all() else float(self.meter.features([filled_in(self.image, mask)])[0] @ target)
            self.lefts[known] = max(rest - before, 0.0) / max(1 - before, 1e-6)
        return self.lefts[known]
