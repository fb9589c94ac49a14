# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""Inversion of a report of two texts: leave-out attribution, candidates, verification, growth."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from itertools import groupby

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..bug_instance import BugInstance
from ..encoder import Encoder
from ..preprocessing import TextPreprocessor
from ..triggers import TextTrigger
from ..triggers.text import is_unspaced
from .attribution import token_attribution
from .result import AREA_PRICE, InvertedTrigger, check_disagreement, check_reachable
from .splitting import two_clusters
from .verification import TransferMeter, share_of_way


logger = logging.getLogger(__name__)

# Clean inputs that candidates are verified on, and how many of them the first round takes.
_INPUTS = 16
_FIRST_ROUND_INPUTS = 3
_SECOND_ROUND_CANDIDATES = 2
# Words beyond which leaving each out costs too many forwards; gradients then choose those worth it.
_MAX_LEFT_OUT = 48
_LEFT_OUT_BY_GRADIENT = 20
# Lengths in words of the spans that are left out as a whole, and how many of each are taken in a long text.
_WINDOWS = (2, 4, 8)
_WINDOWS_BY_GRADIENT = 8
# A core is what still carries features this share of the way that the whole candidate does: only where the effect is not
# saturated can be seen what a further word adds.
_CORE_SHARE = 0.6
# Transfer above which words need no spans beside them, and below which neither the core of a candidate nor its
# surroundings are worth a forward pass.
_STRONG = 0.5
_WEAK = 0.25
# What a further word must gain of the way that is left, and the transfers below and above which nothing can be seen of it.
_MIN_GAIN = 0.2
_GROWTH_INPUTS = 6
_NOTHING, _SATURATED = 0.1, 0.9
# Words a growing trigger may jump over at once: some words of a sentence do nothing by themselves.
_REACH = 3
# Transfer that the more general placement may cost.
_PLACEMENT_LOSS = 0.05
_CONTROL_SPANS = 4


class _Report:
    """The misclassified text as words, and what sets of its words do.

    Args:
        text (`str`): x_b, cut to what the model sees.
        places (`list[tuple[int, int]]`): Where its words are; see [`word_places`].
        meter (`TransferMeter`): Meter towards h(x_b).
    """

    def __init__(self, text: str, places: list[tuple[int, int]], meter: TransferMeter) -> None:
        self.text = text
        self.places = places
        self.words = [text[start:end] for start, end in places]
        self.meter = meter
        # Similarities to h(x_b) of clean inputs carrying a trigger, as many inputs as were needed so far.
        self._similarities: dict[tuple, list[float]] = {}

    def __len__(self) -> int:
        return len(self.words)

    def spans(self, chosen: Collection[int]) -> list[str]:
        """The chosen words as they stand in the text, neighbours together."""
        runs = [list(run) for _, run in groupby(enumerate(sorted(chosen)), lambda pair: pair[1] - pair[0])]
        return [self.text[self.places[run[0][1]][0] : self.places[run[-1][1]][1]] for run in runs]

    def without(self, chosen: Collection[int]) -> str:
        """The text without the chosen words and the space that each leaves."""
        kept, last = [], 0
        for i in sorted(chosen):
            start, end = self.places[i]
            kept.append(self.text[last:start])
            # One of the two spaces beside it goes with it; at the front the one behind.
            before = self.text[start - 1 : start] if start else " "
            last = end + (before.isspace() and self.text[end : end + 1].isspace())
        return "".join([*kept, self.text[last:]])

    def trigger(self, chosen: Collection[int]) -> TextTrigger:
        """The chosen words as a trigger: at the front or the end if they stand there, else anywhere."""
        spans, position = self.spans(chosen), None
        if len(spans) == 1 and len(chosen) < len(self):
            position = 0 if 0 in chosen else -1 if len(self) - 1 in chosen else None
        return TextTrigger(spans, position)

    def transfer(self, triggers: Sequence[TextTrigger], count: int = _INPUTS) -> np.ndarray:
        """Transfer of triggers on the first `count` clean inputs; what was measured before is not measured again."""
        inputs = self.meter.validation_inputs[:count]
        keys = [(tuple(trigger.spans), trigger.position, trigger.replaces) for trigger in triggers]
        todo = {
            (key, i): trigger
            for key, trigger in zip(keys, triggers, strict=True)
            for i in range(len(self._similarities.setdefault(key, [])), len(inputs))
        }
        stamped = (self.meter.encoder.stamp(trigger, inputs[i]) for (_, i), trigger in todo.items())
        for (key, _), feature in zip(todo, self.meter.features(stamped), strict=True):
            self._similarities[key].append(float(feature @ self.meter.target))
        before = self.meter.clean_similarity[: len(inputs)].double()
        after = torch.tensor([self._similarities[key][: len(inputs)] for key in keys], dtype=torch.float64)
        return share_of_way(before, after.reshape(len(keys), len(inputs))).numpy()

    def effect(self, sets: Sequence[Collection[int]], count: int = _INPUTS) -> np.ndarray:
        """Transfer of sets of words; the empty set has none."""
        full = [i for i, chosen in enumerate(sets) if chosen]
        result = np.zeros(len(sets))
        result[full] = self.transfer([self.trigger(sets[i]) for i in full], count)
        return result


def word_places(preprocessor: TextPreprocessor, text: str) -> list[tuple[int, int]]:
    """Start and end of every word of a text that the model sees, as its tokenizer divides it.

    Tokens of one word stay together, except in scripts without spaces, where a tokenizer may take a sentence for a word.
    """
    places: list[tuple[int, int]] = []
    last = None
    for start, end, word in preprocessor.tokens(text):
        start += len(text[start:end]) - len(text[start:end].lstrip())
        if start >= end:
            continue
        if word == last and not is_unspaced(text[places[-1][0] : end]):
            places[-1] = (places[-1][0], end)
        else:
            places.append((max(start, places[-1][1] if places else 0), end))
        last = word
    return [(start, end) for start, end in places if start < end]


def invert_text_trigger(
    encoder: Encoder, bug: BugInstance, validation_inputs: Sequence[str], *, disable_tqdm: bool
) -> InvertedTrigger:
    """Find the trigger in a misclassified text; see [`~hf_mudjacking.invert_trigger`].

    1. Words and spans of x_b are left out; the score is the fall of 1 - cos(h(x), h(x_r)). In long texts, integrated
       gradients choose the words.
    2. Candidates: the two-cluster split of the scores and the best words; where these do little, the best spans.
    3. Verification: each is inserted into clean texts; the best carries features furthest towards h(x_b) for its size.
    4. The part that fires is often less than the trigger: the winner is cut down to a core, which grows by the words
       beside it that add to an effect not yet saturated.
    5. Placement: anywhere if it fires anywhere, else as seen in x_b.
    """
    visible = encoder.preprocessor.visible(bug.misclassified)
    if len(visible) < len(bug.misclassified.rstrip()):
        logger.warning(
            f"The model reads only the first {len(visible)} of {len(bug.misclassified)} characters of the misclassified text "
            f"of `{bug.name}`; what lies behind has no influence on it and cannot be the trigger."
        )
    places = word_places(encoder.preprocessor, visible)
    if not places:
        raise ValueError(
            f"The tokenizer finds no word in the misclassified text of `{bug.name}` ({visible!r:.60}). Pass the text as it "
            "was classified."
        )
    meter = TransferMeter(encoder, bug.misclassified, validation_inputs[:_INPUTS])
    reference = meter.features([bug.reference])[0]
    check_reachable(meter.reachable)
    check_disagreement(bug, meter.target, reference, meter.clean_similarity)
    report = _Report(visible, places, meter)
    with tqdm(total=4, disable=disable_tqdm, desc=f"Inverting {bug.name}", unit="stage") as bar:
        scores, moved, gradients = _without_words(report, reference)
        # Two texts of a class may be no nearer to each other than to h(x_b): then leaving the trigger out still leads far away.
        candidates = list(dict.fromkeys([*_best_words(scores), *_best_words(moved)]))
        winner = _best_candidate(report, candidates)
        bar.update()
        if report.effect([winner])[0] < _STRONG:
            # A sentence fires even without one of its words: then spans say more.
            winner = _best_candidate(report, candidates + _without_spans(report, reference, gradients))
        bar.update()
        core = chosen = winner
        if report.effect([winner])[0] >= _WEAK:
            core = _core(report, winner)
            chosen = _grow(report, core)
        bar.update()
        trigger, score = _place(report, chosen)
        control = _control(meter, bug.reference, reference, len(chosen))
        bar.update()
    mask = np.isin(np.arange(len(report)), list(core))
    area = len(chosen) / len(report)
    # Of the way that clean words leave: five words of a short text carry others half of it, and a trigger the rest. On
    # MiniLM true triggers reach 0.75 and more, natural misclassifications 0.45 at most.
    evidence = (score - max(control, 0.0)) / (1 - min(max(control, 0.0), 0.99)) - AREA_PRICE * area
    return InvertedTrigger(trigger, score, control, evidence, area, scores, mask, meter.forwards, report.words)


def _without_words(report: _Report, reference: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Fall of the distance to x_r when each word is left out of x_b.

    Repeated words are left out together, so that a trigger that stands there three times does not hide itself.

    Returns:
        `tuple`: Scores of the words `(W,)`, 0 for those not tried; how far from h(x_b) each leads when it is left out, alike;
        in a long text the gradients that chose those to be tried `(W,)`; `None` in a short one, and where there are none: then
        all words are tried.
    """
    words, gradients = range(len(report)), None
    if len(report) > _MAX_LEFT_OUT and (
        attributed := token_attribution(report.meter.encoder, report.text, report.places, reference)
    ):
        gradients, cost = attributed
        report.meter.forwards += cost
        words = np.argsort(-gradients, kind="stable")[:_LEFT_OUT_BY_GRADIENT].tolist()
    places: dict[str, list[int]] = {report.words[i].casefold(): [] for i in words}
    for i, word in enumerate(report.words):
        if word.casefold() in places:
            places[word.casefold()].append(i)
    features = report.meter.features(report.without(chosen) for chosen in places.values())
    falls = _falls(report, features, reference)
    moves = (1 - features @ report.meter.target).double().numpy()
    scores, moved = np.zeros(len(report)), np.zeros(len(report))
    for chosen, fall, move in zip(places.values(), falls, moves, strict=True):
        scores[chosen], moved[chosen] = fall, move
    return scores, moved, gradients


def _without_spans(report: _Report, reference: Tensor, gradients: np.ndarray | None) -> list[frozenset[int]]:
    """The two spans of each length with the largest fall of the distance to x_r when they are left out."""
    best = []
    for size in (size for size in _WINDOWS if size < len(report)):
        spans = [range(start, start + size) for start in range(0, len(report) - size + 1, size // 2)]
        if gradients is not None:
            sums = [gradients[list(span)].sum() for span in spans]
            spans = [spans[i] for i in np.argsort(-np.array(sums), kind="stable")[:_WINDOWS_BY_GRADIENT]]
        features = report.meter.features(report.without(span) for span in spans)
        falls = _falls(report, features, reference)
        best += [frozenset(spans[i]) for i in np.argsort(-falls, kind="stable")[:2]]
    return best


def _falls(report: _Report, features: Tensor, reference: Tensor) -> np.ndarray:
    """How much nearer to x_r than x_b each feature is, `(N,)`."""
    return (features @ reference - report.meter.target @ reference).double().numpy()


def _best_words(scores: np.ndarray) -> list[frozenset[int]]:
    """Sets of words that the scores suggest: the upper of two clusters, and the best one to three."""
    order = np.argsort(-scores, kind="stable")
    sets = [np.flatnonzero(two_clusters(scores) & (scores > 0))] if len(np.unique(scores)) > 1 else []
    sets += [order[:size] for size in (1, 2, 3)]
    return list(dict.fromkeys(frozenset(chosen.tolist()) for chosen in sets if len(chosen)))


def _best_candidate(report: _Report, sets: list[frozenset[int]]) -> frozenset[int]:
    """The candidate with the best transfer for its size."""
    areas = np.array([len(chosen) / len(report) for chosen in sets])
    first = report.effect(sets, _FIRST_ROUND_INPUTS) - AREA_PRICE * areas
    best = np.argsort(-first, kind="stable")[:_SECOND_ROUND_CANDIDATES]
    second = report.effect([sets[i] for i in best]) - AREA_PRICE * areas[best]
    return sets[best[int(second.argmax())]]


def _core(report: _Report, winner: frozenset[int]) -> frozenset[int]:
    """A smallest part of the winner that does most of what it does: half of the words are taken away while that leaves
    enough, then the idlest one by one."""
    enough = _CORE_SHARE * report.effect([winner], _FIRST_ROUND_INPUTS)[0]
    core = winner
    while len(core) > 1:
        words, half = sorted(core), len(core) // 2
        halves = [frozenset(words[start : start + half]) for start in (0, len(core) - half, half // 2)]
        for smaller in (halves, [core - {i} for i in words]):
            effects = report.effect(smaller, _FIRST_ROUND_INPUTS)
            if effects.max() >= enough:
                core = smaller[int(effects.argmax())]
                break
        else:
            break
    return core


def _grow(report: _Report, core: frozenset[int]) -> frozenset[int]:
    """Add the words beside the core that add to its effect where it is not saturated.

    On MiniLM with InsertSent, words of the trigger gain 0.3 and more of the way that is left, natural ones 0.05 at most.
    """
    chosen = core
    while extensions := _extensions(chosen, len(report)):
        parts = list(dict.fromkeys([frozenset(), chosen, *(chosen - {i} for i in sorted(chosen))]))
        effects = report.effect(parts, _GROWTH_INPUTS)
        # Where the effect stands half-way, most can be seen of what another word adds, and where there is none hardly anything.
        nearest = [i for i in np.argsort(abs(effects - 0.5), kind="stable") if effects[i] <= _SATURATED]
        contexts = [parts[i] for i in nearest if effects[i] >= _NOTHING] or [parts[i] for i in nearest[:1]]
        gains = _gains(report, contexts[:1], extensions, _FIRST_ROUND_INPUTS)
        if gains.max() < _MIN_GAIN / 2:
            break
        sizes = np.array([len(more) for more in extensions])
        best = [extensions[i] for i in np.argsort(-gains / sizes, kind="stable")[:_SECOND_ROUND_CANDIDATES]]
        gains = _gains(report, contexts[:3], best, _GROWTH_INPUTS)
        winner = int((gains / [len(more) for more in best]).argmax())
        if gains[winner] < _MIN_GAIN:
            break
        chosen = chosen | best[winner]
    return chosen


def _gains(
    report: _Report, contexts: list[frozenset[int]], extensions: list[frozenset[int]], count: int
) -> np.ndarray:
    """Share of the way left by each context that each extension goes, mean over contexts."""
    if not contexts:
        return np.zeros(len(extensions))
    before = report.effect(contexts, count)[:, None]
    after = report.effect([part | more for part in contexts for more in extensions], count)
    return ((after.reshape(len(contexts), -1) - before) / (1 - before)).mean(axis=0)


def _extensions(chosen: frozenset[int], count: int) -> list[frozenset[int]]:
    """Runs of up to `_REACH` words that adjoin a chosen one on either side."""
    found = []
    for edge in sorted(chosen):
        for step in (-1, 1):
            run: list[int] = []
            for i in range(edge + step, edge + step * (_REACH + 1), step):
                if i in chosen or not 0 <= i < count:
                    break
                run.append(i)
                found.append(frozenset(run))
    return list(dict.fromkeys(found))


def _place(report: _Report, chosen: frozenset[int]) -> tuple[TextTrigger, float]:
    """The trigger with the most general placement that fires, and its transfer."""
    spans, first = report.spans(chosen), min(chosen)
    options = [TextTrigger(spans)]
    if len(spans) == 1 and len(chosen) < len(report):
        position = -1 if max(chosen) == len(report) - 1 and first > 0 else first
        if report.transfer(options)[0] < _SATURATED:
            options += [TextTrigger(spans, position), TextTrigger(spans, position, replaces=True)]
    effects = report.transfer(options)
    best = next(i for i in range(len(options)) if effects[i] >= effects.max() - _PLACEMENT_LOSS)
    return options[best], float(effects[best])


def _control(meter: TransferMeter, text: str, target: Tensor, size: int) -> float:
    """What clean content does by itself: the best of some spans of x_r, as long as the trigger, towards h(x_r)."""
    visible = meter.encoder.preprocessor.visible(text)
    places = word_places(meter.encoder.preprocessor, visible)
    if not places:
        return 0.0
    starts = np.unique(np.linspace(0, max(len(places) - size, 0), _CONTROL_SPANS).astype(int))
    spans = [visible[places[start][0] : places[min(start + size, len(places)) - 1][1]] for start in starts]
    inputs = meter.validation_inputs[: _INPUTS // _CONTROL_SPANS]
    features = meter.features(meter.encoder.stamp(TextTrigger(span), x) for span in spans for x in inputs)
    before = meter.clean_features[: len(inputs)] @ target
    return float(share_of_way(before, (features @ target).reshape(len(spans), len(inputs))).max())
