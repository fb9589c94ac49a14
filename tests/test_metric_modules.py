# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""`evaluate.load` takes the files of the package, offline, and they compute what the classes do."""

import os
import subprocess
import sys

import evaluate
import numpy as np
import pytest

from hf_mudjacking.evaluation import metrics as classes
from hf_mudjacking.metrics import METRICS, metric_path


# Target 9. Rows: hit, hit, right, miss, target class predicted as target, target class predicted as 1.
PREDICTIONS, TRUTH = [9, 9, 3, 5, 9, 1], [1, 2, 3, 4, 9, 9]
CLASS_NAMES = {
    "attack_success_rate": "AttackSuccessRate",
    "robust_accuracy": "RobustAccuracy",
    "clean_accuracy": "CleanAccuracy",
}


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """Copied scripts and arrow files go to a folder of these tests, not to the user's cache."""
    folder = tmp_path_factory.mktemp("evaluate")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("evaluate.config.HF_MODULES_CACHE", str(folder))
        patch.setattr("evaluate.config.HF_METRICS_CACHE", str(folder / "metrics"))
        patch.syspath_prepend(str(folder))
        yield folder


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("attack_success_rate", {"target": 9}, 2 / 4),
        ("attack_success_rate", {"target": 9, "include_target_class": True}, 3 / 6),
        ("robust_accuracy", {}, 2 / 6),
        ("robust_accuracy", {"target": 9}, 1 / 4),
        ("clean_accuracy", {}, 2 / 6),
    ],
)
@pytest.mark.parametrize("keep_in_memory", [False, True])
def test_loaded_metrics_compute_the_rates(name, options, expected, keep_in_memory, tmp_path):
    metric = evaluate.load(metric_path(name), keep_in_memory=keep_in_memory, cache_dir=str(tmp_path))
    assert metric.name == name
    assert metric.compute(predictions=PREDICTIONS, references=TRUTH, **options) == {name: expected}
    metric.add_batch(predictions=np.array(PREDICTIONS[:2]), references=np.array(TRUTH[:2]))
    metric.add_batch(predictions=PREDICTIONS[2:], references=TRUTH[2:])
    assert metric.compute(**options) == {name: expected}
    assert keep_in_memory != any(tmp_path.rglob("*.arrow*"))


@pytest.mark.parametrize("name", METRICS)
def test_the_loaded_class_is_that_of_the_package(name):
    assert type(evaluate.load(metric_path(name))) is getattr(classes, CLASS_NAMES[name])


def test_combined_rates_of_triggered_inputs():
    combined = evaluate.combine([metric_path("attack_success_rate"), metric_path("robust_accuracy")])
    rates = combined.compute(predictions=PREDICTIONS, references=TRUTH, target=9)
    assert rates == {"attack_success_rate": 2 / 4, "robust_accuracy": 1 / 4}


def test_a_fresh_process_loads_them_without_network(tmp_path):
    code = (
        "import evaluate\n"
        "from hf_mudjacking.metrics import metric_path\n"
        "metric = evaluate.load(metric_path('robust_accuracy'))\n"
        "print(metric.compute(predictions=[1, 2], references=[1, 3])['robust_accuracy'])"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "HF_MODULES_CACHE": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.split()[-1] == "0.5"


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="There is no metric `accuracy`; choose one of attack_success_rate, clean"):
        metric_path("accuracy")
