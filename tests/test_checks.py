# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.

import io

import numpy as np
import pytest
import torch
from rich.console import Console

from hf_mudjacking import Encoder
from hf_mudjacking.evaluation import DownstreamTask, LabelledInputs, TaskFeatures, compare_downstream
from hf_mudjacking.evaluation.checks import attacked_class, downstream_rates, task_features
from hf_mudjacking.evaluation.drawing import draw_bug_report, flipped_inputs
from hf_mudjacking.evaluation.report import library_versions, report_lines, report_tables

from .conftest import make_images


def one_hot(classes: list[int]) -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.tensor(classes), 3).float()


class ReadsOneHot:
    """A classifier whose prediction is the position of the largest feature."""

    def predict(self, features: np.ndarray) -> np.ndarray:
        return features.argmax(axis=1)


@pytest.fixture
def toy_task() -> DownstreamTask:
    """Test labels 0, 1, 1, 2; train labels 0, 1, 2 four times each."""
    images = make_images(16)
    return DownstreamTask(
        LabelledInputs(images[:12], np.tile([0, 1, 2], 4)), LabelledInputs(images[12:], np.array([0, 1, 1, 2])), "toy"
    )


def toy_features(test: list[int], stamped: list[int], misclassified: int) -> TaskFeatures:
    return TaskFeatures(
        train=one_hot([0, 1, 2] * 4),
        test=one_hot(test),
        stamped=one_hot(stamped),
        misclassified=one_hot([misclassified]),
        reference=one_hot([1]),
    )


def test_rates_by_hand(toy_task):
    features = toy_features(test=[0, 1, 2, 2], stamped=[0, 0, 1, 0], misclassified=0)
    rates = downstream_rates(ReadsOneHot(), features, toy_task, target=0)
    # Clean: 3 of 4 right. Triggered inputs of other classes: predicted 0, 1, 0 with the truth 1, 1, 2.
    assert rates == {"BA": 0.75, "ASR": pytest.approx(2 / 3), "RA": pytest.approx(1 / 3), "bug_fixed": False}


def test_comparison_keeps_one_classifier_and_retrains_the_other(toy_task):
    before = toy_features(test=[0, 1, 1, 2], stamped=[0, 0, 0, 0], misclassified=0)
    # The patched encoder permutes its features: a retrained classifier follows, the kept one cannot.
    turned = {0: 1, 1: 2, 2: 0}
    after = TaskFeatures(
        train=one_hot([turned[c] for c in [0, 1, 2] * 4]),
        test=one_hot([turned[c] for c in [0, 1, 1, 2]]),
        stamped=one_hot([turned[c] for c in [0, 1, 1, 2]]),
        misclassified=one_hot([turned[1]]),
        reference=one_hot([turned[1]]),
    )
    result = compare_downstream(before, after, toy_task, target=0)
    assert result["before"]["kept"] == {"BA": 1.0, "ASR": 1.0, "RA": 0.0, "bug_fixed": False}
    assert result["after"]["retrained"] == {"BA": 1.0, "ASR": 0.0, "RA": 1.0, "bug_fixed": True}
    assert result["after"]["kept"]["BA"] == 0.0
    assert "clean" not in result
    assert attacked_class(before, toy_task) == 0
    with_clean = compare_downstream(
        before, after, toy_task, target=0, clean=toy_features([0, 1, 1, 2], [0, 1, 0, 2], 1)
    )
    assert with_clean["clean"] == {"CA": 1.0, "ASR-B": pytest.approx(1 / 3), "RA": pytest.approx(2 / 3)}


def test_stamped_features_need_a_target(toy_task):
    features = toy_features(test=[0, 1, 2, 2], stamped=[0, 0, 1, 0], misclassified=0)
    with pytest.raises(ValueError, match="There are stamped features, and no `target`"):
        downstream_rates(ReadsOneHot(), features, toy_task)
    bare = TaskFeatures(features.train, features.test)
    result = compare_downstream(bare, bare, toy_task, target=0, clean=bare)
    assert result["clean"].keys() == {"CA"}


def test_what_is_not_of_the_models_kind(backdoored, por):
    texts, task, implant = por
    encoder = Encoder(backdoored.model(), backdoored.processor)
    pictures = DownstreamTask(backdoored.train, backdoored.test)
    for what, given in (("task", (encoder, task)), ("trigger", (encoder, pictures, implant.trigger))):
        with pytest.raises(TypeError, match=rf"{what}.* is for texts, but the model takes images"):
            task_features(*given)
    with pytest.raises(TypeError, match="is for images, but the model takes texts"):
        draw_bug_report(texts, task, backdoored.trigger)


def test_drawn_report_is_one_that_a_client_would_make(backdoored):
    task = DownstreamTask(backdoored.train, backdoored.test, "digits")
    encoder = Encoder(backdoored.model(), backdoored.processor)
    bug = draw_bug_report(encoder, task, backdoored.trigger, seed=3)
    predictions = backdoored.kept.predict(encoder.encode([bug.misclassified, bug.reference]).numpy())
    assert predictions[0] == backdoored.target
    assert predictions[1] != backdoored.target
    again = draw_bug_report(encoder, task, backdoored.trigger, seed=3)
    assert np.array_equal(np.asarray(bug.misclassified), np.asarray(again.misclassified))


class Reads:
    """A classifier whose features are its predictions."""

    def predict(self, features):
        return features.astype(int)


def test_flipped_inputs_are_right_ones_that_reach_the_target():
    truth = np.array([0, 1, 1, 1, 2, 2])
    clean, stamped = torch.tensor([0, 1, 1, 2, 2, 2]), torch.tensor([0, 0, 1, 0, 0, 1])
    found = flipped_inputs(Reads(), clean, stamped, truth)
    assert found.target == 0
    assert found.right.tolist() == [True, True, True, False, True, True]
    assert found.flipped.tolist() == [False, True, False, False, True, False]
    assert flipped_inputs(Reads(), clean, stamped, truth, target=1).flipped.tolist() == [False] * 5 + [True]
    assert flipped_inputs(Reads(), clean, stamped, truth, 0, victims=np.array([4])).flipped.nonzero()[0].tolist() == [
        4
    ]


def test_an_input_that_is_not_flipped_any_more_changes_no_other_pair():
    """Two processes may disagree on one input by the last bit of a classifier; they must not draw other reports for it."""
    truth, stamped = np.repeat(np.arange(4), 30), torch.zeros(120)
    clean = torch.from_numpy(truth)
    pairs = list(flipped_inputs(Reads(), clean, stamped, truth).pairs(seed=5))
    assert len(pairs) == 90
    assert all(truth[row] == truth[other] != 0 and row != other for row, other in pairs)
    stamped[pairs[40][0]] = 3 if truth[pairs[40][0]] != 3 else 2
    assert list(flipped_inputs(Reads(), clean, stamped, truth).pairs(seed=5)) == [*pairs[:40], *pairs[41:]]
    assert list(flipped_inputs(Reads(), clean, stamped, truth).pairs(seed=6)) != pairs


def test_no_report_from_a_clean_encoder(backdoored):
    half = backdoored.test.select(range(40))
    task = DownstreamTask(backdoored.train, half, "digits")

    class DoesNothing:
        modality = "image"

        def apply(self, x):
            return x

    with pytest.raises(ValueError, match="changes no correct prediction"):
        draw_bug_report(Encoder(backdoored.clean_model, backdoored.processor), task, DoesNothing())


def test_task_features_stamp_the_raw_inputs(backdoored):
    task = DownstreamTask(backdoored.train.select(range(20)), backdoored.test.select(range(10)), "digits")
    encoder, bug = Encoder(backdoored.model(), backdoored.processor), backdoored.bug()
    features = task_features(encoder, task, backdoored.trigger, bug, disable_tqdm=True)
    by_hand = encoder.encode([backdoored.trigger.apply(task.test.inputs[4])])
    assert torch.allclose(features.stamped[4:5], by_hand, atol=1e-6)
    assert features.train.shape == (20, 64)
    assert torch.allclose(features.misclassified, encoder.encode([bug.misclassified]), atol=1e-6)


def test_table_and_lines_show_the_figures():
    rates = {"BA": 0.9, "ASR": 0.123, "RA": 0.8, "bug_fixed": True}
    block = {"before": {"kept": rates, "retrained": rates}, "after": {"kept": rates, "retrained": rates}}
    report = {
        **block,
        "clean": {"CA": 0.95, "ASR-B": 0.01, "RA": 0.9},
        "other_classifiers": {"mlp": block},
        "triggers": [
            {"kind": "patch", "description": "patch, 6.2% of the picture", "transfer": 0.97, "iou": 0.8, "recall": 1.0}
        ],
        "cost": {
            "inversion_forwards": 10,
            "forward_equivalents": 100,
            "steps": 3,
            "seconds": 1.5,
            "peak_memory_mb": 7,
        },
        "settings": {"classifier": "logistic", "task": "toy"},
    }
    [table] = report_tables(report)
    assert table.row_count == 7
    cells = list(table.columns[3].cells)
    assert cells[:2] == ["1.0", "12.3"]
    lines = report_lines(report)
    assert "IoU with the true trigger 0.80" in lines[0]
    assert "100 forward-equivalents" in lines[1]
    # A client may call a task what it will, and a terminal be narrow
    named = {**report, "settings": {**report["settings"], "task": "old[/b]"}}
    [table] = report_tables(named)
    console = Console(width=30, file=io.StringIO())
    console.print(table)
    shown = console.file.getvalue()
    assert "old[/b]" in " ".join(shown.split())
    assert shown.count("12.3") == sum(cell == "12.3" for column in table.columns for cell in column.cells) > 0


def test_versions_name_what_is_installed():
    assert library_versions()["torch"].split("+")[0] == torch.__version__.split("+")[0]


def test_labelled_inputs_must_pair_up_and_differ(images):
    with pytest.raises(ValueError, match="16 inputs and 3 labels"):
        LabelledInputs(images, np.array([0, 1, 2]))
    with pytest.raises(ValueError, match="at least two classes"):
        LabelledInputs(images, np.zeros(16, dtype=int))
    with pytest.raises(ValueError, match=r"must be integers.*class_encode_column"):
        LabelledInputs(images, np.array(["a", "b"] * 8))
