# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""Does the repair hold downstream? Classifiers, rates, reports."""

from .checks import TaskFeatures, compare_downstream, downstream_rates, task_features
from .classifiers import MLPClassifier, train_classifier
from .drawing import FlippedInputs, draw_bug_report, flipped_inputs
from .metrics import AttackSuccessRate, CleanAccuracy, RobustAccuracy
from .pretraining import pretrain_encoder, pretrain_two_towers
from .tasks import DownstreamTask, LabelledInputs
from .zero_shot import ZeroShotClassifier, retrieval_rates, retrieval_recall


__all__ = [
    "AttackSuccessRate",
    "CleanAccuracy",
    "DownstreamTask",
    "FlippedInputs",
    "LabelledInputs",
    "MLPClassifier",
    "RobustAccuracy",
    "TaskFeatures",
    "ZeroShotClassifier",
    "compare_downstream",
    "downstream_rates",
    "draw_bug_report",
    "flipped_inputs",
    "pretrain_encoder",
    "pretrain_two_towers",
    "retrieval_rates",
    "retrieval_recall",
    "task_features",
    "train_classifier",
]
