# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""Does the repair hold downstream? Classifiers, rates, reports."""

from .checks import TaskFeatures, compare_downstream, downstream_rates, draw_bug_report, task_features
from .classifiers import MLPClassifier, train_classifier
from .metrics import AttackSuccessRate, CleanAccuracy, RobustAccuracy
from .pretraining import pretrain_encoder, pretrain_two_towers
from .tasks import DownstreamTask, LabelledInputs
from .zero_shot import ZeroShotClassifier, retrieval_rates, retrieval_recall


__all__ = [
    "AttackSuccessRate",
    "CleanAccuracy",
    "DownstreamTask",
    "LabelledInputs",
    "MLPClassifier",
    "RobustAccuracy",
    "TaskFeatures",
    "ZeroShotClassifier",
    "compare_downstream",
    "downstream_rates",
    "draw_bug_report",
    "pretrain_encoder",
    "pretrain_two_towers",
    "retrieval_rates",
    "retrieval_recall",
    "task_features",
    "train_classifier",
]
