# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""The rates as `evaluate.Metric` classes; `evaluate.load` takes the files in `hf_mudjacking/metrics`."""

from __future__ import annotations

import operator
from typing import Any

import datasets
import evaluate
import numpy as np


_CITATION = """@inproceedings{liu2024mudjacking,
  title={Mudjacking: Patching Backdoor Vulnerabilities in Foundation Models},
  author={Liu, Hongbin and Reiter, Michael K. and Gong, Neil Zhenqiang},
  booktitle={33rd USENIX Security Symposium},
  year={2024}
}"""


class _RateMetric(evaluate.Metric):
    """Base of the rates below: predictions and true labels in, one rate from 0 to 1 out.

    Args:
        keep_in_memory (`bool`, *optional*, defaults to `True`): Whether what is added stays in memory; else `evaluate` writes
            arrow and lock files into the user's cache, which `num_process` above 1 needs. `evaluate.load` passes `False`
            unless told otherwise.
        kwargs: Passed to `evaluate.Metric`.
    """

    description = ""

    def __init__(self, keep_in_memory: bool = True, **kwargs: Any) -> None:
        super().__init__(keep_in_memory=keep_in_memory, **kwargs)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self.description,
            citation=_CITATION,
            features=datasets.Features(
                {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}
            ),
        )


class AttackSuccessRate(_RateMetric):
    """ASR: share of triggered inputs that are predicted as the target class.

    Inputs whose true class is the target are left out, as in the released Mudjacking code;
    `include_target_class=True` counts them, as in BadEncoder's own code.

    Example:

    ```python
    >>> AttackSuccessRate().compute(predictions=[9, 9, 3, 9], references=[1, 2, 3, 9], target=9)
    {'attack_success_rate': 0.6666666666666666}
    ```
    """

    description = "Share of triggered inputs of other classes that are predicted as the target class."

    def _compute(
        self, predictions: list[int], references: list[int], target: int, include_target_class: bool = False
    ) -> dict[str, float]:
        target = operator.index(target)
        hit, counted = np.asarray(predictions) == target, np.asarray(references) != target
        return {"attack_success_rate": _rate(hit, counted | include_target_class, "attack success rate", target)}


class RobustAccuracy(_RateMetric):
    """RA: share of triggered inputs that are predicted as their true class.

    Inputs whose true class is `target` are left out when it is given, as in the released Mudjacking code (there TBA).

    Example:

    ```python
    >>> RobustAccuracy().compute(predictions=[9, 2, 3, 9], references=[1, 2, 3, 9], target=9)
    {'robust_accuracy': 0.6666666666666666}
    ```
    """

    description = "Share of triggered inputs that are predicted as their true class."

    def _compute(self, predictions: list[int], references: list[int], target: int | None = None) -> dict[str, float]:
        truth = np.asarray(references)
        counted = np.ones(len(truth), dtype=bool) if target is None else truth != operator.index(target)
        return {"robust_accuracy": _rate(np.asarray(predictions) == truth, counted, "robust accuracy", target)}


class CleanAccuracy(_RateMetric):
    """CA of a clean encoder, BA of a backdoored or patched one: share of clean inputs predicted as their true class.

    Example:

    ```python
    >>> CleanAccuracy().compute(predictions=[1, 2, 3, 4], references=[1, 2, 3, 9])
    {'clean_accuracy': 0.75}
    ```
    """

    description = "Share of clean inputs that are predicted as their true class."

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float]:
        truth = np.asarray(references)
        everything = np.ones(len(truth), dtype=bool)
        return {"clean_accuracy": _rate(np.asarray(predictions) == truth, everything, "clean accuracy", None)}


def most_frequent(predictions: np.ndarray) -> int:
    """The class that occurs most often; the smallest such in a tie. For a task-agnostic attack, where triggered inputs go."""
    classes, counts = np.unique(predictions, return_counts=True)
    return int(classes[counts.argmax()])


def _rate(hit: np.ndarray, counted: np.ndarray, name: str, target: int | None) -> float:
    if not len(counted):
        raise ValueError(f"There is no prediction to measure the {name} on.")
    if not counted.any():
        raise ValueError(f"No input is left to measure the {name} on: all are of the target class {target}.")
    return float(hit[counted].mean())
