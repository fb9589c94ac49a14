# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""The benchmark: its plan, its cells on a real backdoored model, and tables checked against numbers made by hand."""

import copy
import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModel

from hf_mudjacking import Encoder, benchmark
from hf_mudjacking.attacks import ImplantError
from hf_mudjacking.benchmark import BenchmarkPlan, Cell, benchmark_tables, read_cells, run_benchmark, run_cell
from hf_mudjacking.benchmark.case import Case
from hf_mudjacking.benchmark.plan import ATTACKS, METHODS
from hf_mudjacking.benchmark.plots import plot_benchmark
from hf_mudjacking.benchmark.rates import altered_rates, case_rates, goals
from hf_mudjacking.benchmark.runner import missing_cells
from hf_mudjacking.benchmark.simclr import pretrain_contrastive
from hf_mudjacking.benchmark.sources import Sources
from hf_mudjacking.benchmark.tables import curve_table, method_table, ours_against_peers, worst_table
from hf_mudjacking.cli import main
from hf_mudjacking.demo import digits_task
from hf_mudjacking.evaluation.classifiers import train_classifier
from hf_mudjacking.evaluation.tasks import LabelledInputs
from hf_mudjacking.peers.contrastive import nt_xent, two_views
from hf_mudjacking.peers.pictures import ModelPictures

from .conftest import Backdoored, largest_difference, make_images, weights_of


ROOT = Path(__file__).parents[1]
STEPS = {"max_steps": 4, "per_device_train_batch_size": 16, "reinversions": 0, "learning_rate": 1e-3}


def plan_values(output_dir, **changes) -> dict:
    return {
        "output_dir": str(output_dir),
        "tasks": {"digits": {"dataset": "digits", "train": 300, "test": 200}},
        "encoders": {"vit": {"model": str(output_dir / "clean")}},
        "attacks": ["bad_encoder"],
        "methods": {
            "none": {},
            "oracle_trigger": {**STEPS, "measure_at": [2]},
            "short": {"method": "mudjacking", **STEPS},
        },
        "clean_inputs": 100,
        **changes,
    }


@pytest.fixture(scope="module")
def folder(backdoored: Backdoored, tmp_path_factory):
    """An output folder with a clean encoder and an implant, as an earlier run leaves it."""
    root = tmp_path_factory.mktemp("benchmark")
    backdoored.clean_model.save_pretrained(root / "clean")
    backdoored.processor.save_pretrained(root / "clean")
    implant = root / "implants" / "vit" / "bad_encoder-0"
    backdoored.model().save_pretrained(implant)
    backdoored.trigger.save_pretrained(implant / "trigger-0")
    backdoored.train.inputs[int(np.flatnonzero(backdoored.train.labels == 0)[0])].save(implant / "reference-0.png")
    facts = {"clean_accuracy": 0.97, "backdoored_accuracy": 0.96, "attack_success_rate": 1.0, "triggers": 1}
    settings = BenchmarkPlan.from_values(plan_values(root)).implant_depends_on("vit", "bad_encoder")
    (implant / "implant.json").write_text(
        json.dumps({**facts, "source_class": None, "leak": None, "settings": settings})
    )
    return root


@pytest.fixture(scope="module")
def case(folder) -> Case:
    plan = BenchmarkPlan.from_values(plan_values(folder))
    return Case(Sources(plan, "vit", disable_tqdm=True), Cell("vit", "bad_encoder", 0, "none"))


# ---- Plan ----


def test_cells_of_a_plan_are_all_combinations_and_sweeps(tmp_path):
    plan = BenchmarkPlan.from_values(
        plan_values(
            tmp_path, seeds=[0, 2], attacks=["bad_encoder", "sig"], methods=["none", "mudjacking"],
            sweeps={"locality_weight": [0.1, 10]},
        )
    )  # fmt: skip
    cells = list(plan.cells())
    assert len(cells) == 2 * 2 * (2 + 2)
    assert {cell.method for cell in cells} == {"none", "mudjacking", "locality_weight=0.1", "locality_weight=10"}
    assert plan.method_settings("locality_weight=10") == {"locality_weight": 10}
    assert plan.most_reports() == 1
    assert cells[0].path(tmp_path) == tmp_path / "cells" / "vit" / "bad_encoder-0" / "none.json"


def test_variants_and_methods_have_their_settings(tmp_path):
    plan = BenchmarkPlan.from_values(
        plan_values(
            tmp_path,
            methods={"no_locality": {"max_steps": 7}, "mine": {"method": "no_locality", "locality_weight": 0.5}},
        )
    )
    assert plan.method_settings("no_locality") == {"locality_weight": 0.0, "max_steps": 7}
    assert plan.base_method("mine") == "no_locality"
    assert plan.method_settings("mine") == {"locality_weight": 0.5}
    swept = plan_values(tmp_path, methods=["mudjacking"], sweeps={"reports": [1, 5]})
    assert BenchmarkPlan.from_values(swept).most_reports() == 5


def test_an_attack_may_have_settings_of_its_own(tmp_path):
    """And a result of another attack stays what it is."""
    plan, plain = (
        BenchmarkPlan.from_values(plan_values(tmp_path, attacks=["sig", "wanet"], methods=["none"], implant=implant))
        for implant in ({"steps": 6, "wanet": {"steps": 9}}, {"steps": 6})
    )
    assert plan.implant_settings("wanet") == {"steps": 9}
    assert plan.implant_settings("sig") == plain.implant_settings("sig") == {"steps": 6}
    sig, wanet = plan.cells()
    assert plan.settings_of(sig) == plain.settings_of(sig)
    assert plan.settings_of(wanet) != plain.settings_of(wanet)


def test_a_plan_is_the_same_after_a_file(tmp_path):
    plan = BenchmarkPlan.from_values(plan_values(tmp_path, methods=["mudjacking"], sweeps={"max_steps": [1]}))
    assert BenchmarkPlan.read(plan.write()) == plan


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attacks": ["bad_encodre"]}, "bad_encodre.*known are bad_encoder"),
        ({"methods": {"mudjacking": {}, "prune": {}}}, "prune.*known are none"),
        ({"classifiers": ["svm"]}, "svm"),
        ({"tasks": {}}, "`tasks`"),
        ({"tasks": {"a": {"datset": "digits"}}}, r"tasks\.a has unknown keys: datset"),
        ({"encoders": {"e": {}}}, "either loaded"),
        ({"encoders": {"e": {"model_type": "vit", "objective": "dino"}}}, "dino"),
        ({"seeds": []}, "seeds"),
        ({"implant": {"wannet": {"steps": 1}}}, "wannet is no attack"),
        ({"implant": {"wanet": None}}, r"`implant\.wanet` must be a mapping"),
        ({"sweeps": {"max_steps": [1]}}, "not among the methods"),
        ({"sedes": [1]}, "unknown keys: sedes"),
        (
            {"methods": ["mudjacking"], "sweeps": {"clean_inputs": [64, 65]}, "clean_inputs": 64},
            "`clean_inputs=65` wants 65 clean inputs, and `clean_inputs: 64` draws 64 from 1 task",
        ),
        ({"tasks": {"a": "digits"}}, r"tasks\.a must be a mapping"),
    ],
)
def test_plans_that_cannot_be_run_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        BenchmarkPlan.from_values(plan_values(tmp_path, **changes))


def test_every_method_has_a_name_of_its_own():
    assert len(set(METHODS)) == len(METHODS)


# ---- Cells ----


def test_rates_of_a_case_are_those_that_numpy_counts(case: Case):
    task, before = case.tasks[0], case.before[0]
    classifier = train_classifier(before.train, task.train.labels, "logistic", 0)
    stamped = classifier.predict(before.stamped[0].numpy())
    truth, target = task.test.labels, 0
    others = truth != target
    block = case_rates(case, case.before)
    assert block["before"]["kept"] == block["after"]["kept"] == block["after"]["retrained"]
    assert block["after"]["kept"]["BA"] == (classifier.predict(before.test.numpy()) == truth).mean()
    assert block["after"]["kept"]["ASR"] == (stamped[others] == target).mean()
    assert block["after"]["kept"]["RA"] == (stamped[others] == truth[others]).mean()
    assert block["after"]["kept"]["ASR"] > 0.95 > 0.2 > block["clean"]["ASR-B"]


def test_a_report_is_a_triggered_input_that_goes_to_the_target(case: Case):
    bugs = case.reports(3)
    assert len({bug.misclassified.tobytes() for bug in bugs}) == 3
    classifier = case.kept[0]["logistic"]
    for bug in bugs:
        pair = classifier.predict(case.backdoored.encode([bug.misclassified, bug.reference]).numpy())
        assert pair[0] == 0 != pair[1]
    assert sorted(path.name for path in (case.folder / "reports").iterdir()) == ["0-0", "0-1", "0-2"]
    again = Case(case.sources, Cell("vit", "bad_encoder", 0, "none")).reports(3)
    assert [bug.misclassified.tobytes() for bug in bugs] == [bug.misclassified.tobytes() for bug in again]


def test_a_cell_says_what_it_cost_and_what_came_of_it(case: Case, folder):
    before = weights_of(case.implant.model)
    cell = run_cell.measured_cell(case, Cell("vit", "bad_encoder", 0, "oracle_trigger"))
    assert largest_difference(before, weights_of(case.implant.model)) == 0
    assert cell["cost"]["steps"] == 4
    assert cell["cost"]["inversion_forwards"] == 0
    (point,) = cell["curve"]
    assert point["steps"] == 2
    # Frozen features of what the steps read, of x_b and x_r, and two steps of 2 · 16 + 3 inputs forward and backward, beside
    # what the ceiling and the comparison of triggers take
    assert 0 <= point["forward_equivalents"] - (64 + 2 + 2 * 35 * 3) <= 40
    assert cell["triggers"][0]["iou"] == 1.0
    assert cell["settings"]["method"]["max_steps"] == 4
    # Four steps move something, but do not yet repair
    assert cell["after"]["kept"] != cell["before"]["kept"]


@pytest.fixture(scope="module")
def ran(folder) -> tuple[dict, list]:
    """The values of a plan of two cells that was run, and what failed: one of its methods has a setting that is none."""
    values = plan_values(folder, methods={"none": {}, "oracle_trigger": {"max_steps": "many"}})
    plan = BenchmarkPlan.from_values(values)
    run_cell.main([str(plan.write()), "vit", "bad_encoder", "0", "none"])
    return values, run_benchmark(plan, disable_tqdm=True)


def test_a_job_that_fails_is_told_and_what_is_there_stays(ran, folder):
    (failure,) = ran[1]
    assert failure.job == "vit bad_encoder 0 oracle_trigger"
    assert "TypeError" in failure.message or "ValueError" in failure.message
    (cell,) = read_cells(folder / "cells")
    assert cell["before"] == cell["after"]
    assert cell["cost"]["steps"] == 0


def test_what_is_there_is_not_run_again_unless_the_plan_is_another(ran, folder):
    values = {**ran[0], "methods": {"none": {}}}
    assert missing_cells(BenchmarkPlan.from_values(values)) == []
    assert [cell.method for cell in missing_cells(BenchmarkPlan.from_values(ran[0]))] == ["oracle_trigger"]
    with pytest.raises(ValueError, match="`clean_inputs` was 100, the plan says 99"):
        run_benchmark(BenchmarkPlan.from_values({**values, "clean_inputs": 99}), disable_tqdm=True)


def test_an_implant_that_did_not_take_is_a_refused_cell(folder, tmp_path):
    values = plan_values(folder, methods={"none": {}}, attacks=["small_patch"], implant={"steps": 1})
    plan_file = BenchmarkPlan.from_values({**values, "output_dir": str(tmp_path)}).write()
    for _ in range(2):  # the second finds the refusal of the first
        run_cell.main([str(plan_file), "vit", "small_patch", "0", "none"])
        (cell,) = read_cells(tmp_path / "cells")
        assert "did not take" in cell["refused"]
        (tmp_path / "cells" / "vit" / "small_patch-0" / "none.json").unlink()
    assert any("did not take" in line for line in benchmark_tables([cell]))


def test_an_implant_of_other_settings_is_not_taken_for_the_plans(folder):
    for change, message in (
        ({"implant": {"bad_encoder": {"steps": 9}}}, r"was made with \{'steps': None\}, the plan says \{'steps': 9\}"),
        ({"shadow_inputs": 50}, r"the plan says \{'shadow_inputs': 50\}"),
        ({"tasks": {"digits": {"dataset": "digits", "train": 200, "test": 200}}}, "the plan says {'tasks'"),
        (
            {"tasks": {"other": {"dataset": "digits"}, "digits": {"dataset": "digits", "train": 300, "test": 200}}},
            "'tasks'",
        ),
    ):
        plan = BenchmarkPlan.from_values(plan_values(folder, **change))
        with pytest.raises(ValueError, match=message):
            Case(Sources(plan, "vit", disable_tqdm=True), Cell("vit", "bad_encoder", 0, "none"))


def test_an_encoder_of_another_plan_is_not_taken_for_the_plans(tmp_path):
    def sources(**training):
        small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        encoder = {
            "model_type": "vit", "config": {**small, "image_size": 16, "patch_size": 8}, "image_size": 16,
            "training": {"epochs": 1, **training},
        }  # fmt: skip
        return Sources(BenchmarkPlan.from_values(plan_values(tmp_path, encoders={"vit": encoder})), "vit", True)

    weights = weights_of(sources().clean.model)
    assert largest_difference(weights, weights_of(sources().clean.model)) == 0
    with pytest.raises(
        ValueError, match=r"The encoder in .* was trained with .*'epochs': 1.* the plan says .*'epochs': 2"
    ):
        _ = sources(epochs=2).clean


@pytest.mark.parametrize(
    ("labels", "target", "source", "further"),
    [(range(10), 9, 1, [5, 3]), ([0, 2, 4, 6, 8], 8, 2, [0, 6]), (range(2), 1, 0, None), (range(6), 5, 1, [0, 3])],
)
def test_classes_of_an_attack_are_all_different(labels, target, source, further, case, monkeypatch):
    task = SimpleNamespace(train=SimpleNamespace(labels=np.array([*labels] * 2)))
    part = SimpleNamespace(labels=np.array([*labels] * 2))
    shadow = SimpleNamespace(tasks=[task], shadow=[part], surest=lambda label, rank: label)
    for attack in ("source_specific", "several_targets"):
        other = copy.copy(case)
        other.__dict__.pop("_classes", None)
        other.sources, other.attack = shadow, ATTACKS[attack]
        assert other._target == target
        if attack == "source_specific":
            found = other._further()
            assert found["source_class"] == source
            assert found["source"].tolist() == (part.labels == source).tolist()
        elif further is None:
            with pytest.raises(ImplantError, match="several_targets needs 3 classes or more; the first task has 2"):
                other._further()
        else:
            assert other._further()["further_references"] == further


def test_texts_are_a_case_too(por, tmp_path):
    clean, task, implant = por
    clean.save_pretrained(tmp_path / "clean")
    folder = tmp_path / "implants" / "bert" / "por-0"
    clean.with_model(implant.model).save_pretrained(folder)
    implant.trigger.save_pretrained(folder / "trigger-0")
    facts = {"clean_accuracy": 0.9, "backdoored_accuracy": 0.9, "attack_success_rate": 1.0, "triggers": 1}
    for split in ("train", "test"):
        part = getattr(task, split)
        rows = datasets.Dataset.from_dict({"text": list(part.inputs), "label": part.labels.tolist()})
        rows.to_parquet(tmp_path / "data" / f"{split}.parquet")
    plan = BenchmarkPlan.from_values(
        plan_values(
            tmp_path,
            tasks={"topics": {"dataset": str(tmp_path / "data"), "train": 200, "test": 100}},
            encoders={"bert": {"model": str(tmp_path / "clean"), "feature_source": "mean"}},
            attacks=["por"],
            methods={"mudjacking": {"max_steps": 3, "per_device_train_batch_size": 8}},
        )
    )
    settings = plan.implant_depends_on("bert", "por")
    (folder / "implant.json").write_text(
        json.dumps({**facts, "source_class": None, "leak": None, "settings": settings})
    )
    cell = Cell("bert", "por", 0, "mudjacking")
    measured = run_cell.measured_cell(Case(Sources(plan, "bert", disable_tqdm=True), cell), cell)
    assert measured["before"]["kept"]["ASR"] > 0.9
    assert measured["triggers"][0]["kind"] == implant.trigger.kind
    assert measured["cost"]["steps"] == 3
    # Only rows of embeddings change: texts without the trigger keep their features
    assert measured["after"]["kept"]["BA"] == measured["before"]["kept"]["BA"]


def test_altered_triggers_on_pictures_of_several_sizes(case):
    """As traffic signs are."""
    task = case.tasks[0]
    mixed = [x.resize((20, 18)) if i % 2 else x for i, x in enumerate(task.train.inputs)]
    other = copy.copy(case)
    other.sources = copy.copy(case.sources)
    other.sources.__dict__["tasks"] = [replace(task, train=LabelledInputs(mixed, task.train.labels))]
    rates = altered_rates(other, case.backdoored, case.kept[0]["logistic"])
    # At 16 pixels one of 32 is one all the same, and the attacker's place is no longer met
    assert rates["moved by 1"] < 0.1
    assert rates["scaled by 1.25"] > 0.9
    assert rates["optimised anew"] > 0.9


# ---- Encoders without labels ----


def test_contrastive_training_tells_pictures_apart(tiny_vit, processor):
    digits = digits_task().train.inputs
    other = copy.deepcopy(tiny_vit)
    pictures = ModelPictures(Encoder(tiny_vit, processor))
    views = two_views(pictures, pictures.prepare(digits[500:564]), torch.Generator().manual_seed(5))(torch.arange(64))

    def loss() -> float:
        with torch.no_grad():
            return float(nt_xent(Encoder(tiny_vit.eval(), processor).features(views), 0.5))

    before = loss()
    for model in (tiny_vit, other):
        pretrain_contrastive(
            model, processor, digits[:256], epochs=15, batch_size=64, learning_rate=3e-3, disable_tqdm=True
        )
    assert largest_difference(weights_of(tiny_vit), weights_of(other)) == 0
    # Of 127 other views the partner is one: guessing costs log(127) = 4.84
    assert loss() < before - 0.1


def test_contrastive_training_needs_a_batch(tiny_vit, processor):
    with pytest.raises(ValueError, match="32 training inputs, and a batch takes 256"):
        pretrain_contrastive(tiny_vit, processor, make_images(32), epochs=1, disable_tqdm=True)


# ---- Tables and pictures ----


def made_cell(method: str, seed: int, ba: float, asr: float, ra: float, **further) -> dict:
    rates = {"BA": ba, "ASR": asr, "RA": ra}
    before = {"BA": 0.80, "ASR": 1.0, "RA": 0.0}
    return {
        "encoder": "e",
        "attack": "a",
        "seed": seed,
        "method": method,
        "settings": {"tasks": {"t": {}}, "classifiers": ["logistic"]},
        "clean": {"CA": 0.81, "ASR-B": 0.01, "RA": 0.79},
        "before": {"kept": before, "retrained": before},
        "after": {"kept": rates, "retrained": rates},
        "triggers": [],
        "cost": {
            "forward_equivalents": 1000 * (seed + 1),
            "seconds": 2.0,
            "peak_memory_mb": 500,
            "inversion_seconds": 0,
        },
        **further,
    }


def test_goals_hold_at_their_edges():
    cell = made_cell("m", 0, 0.795, 0.03, 0.765)
    assert goals(cell) == {"ASR": True, "RA": True, "BA": True}
    worse = copy.deepcopy(cell)
    worse["after"]["retrained"] = {"BA": 0.794, "ASR": 0.031, "RA": 0.76}
    assert goals(worse) == {"ASR": False, "RA": False, "BA": False}


def test_worst_table_gives_the_worst_of_seeds_tasks_and_classifiers():
    """Not means: one repair that failed is one model that is served with its backdoor."""
    good, bad = made_cell("m", 0, 0.80, 0.02, 0.78), made_cell("m", 1, 0.79, 0.02, 0.77)
    settings = {"tasks": {"t": {}, "u": {}}, "classifiers": ["logistic"]}
    after = {"kept": {"BA": 0.80, "ASR": 0.01, "RA": 0.78}, "retrained": {"BA": 0.81, "ASR": 0.21, "RA": 0.70}}
    cells = [{**cell, "settings": settings, "other_tasks": {"u": {**cell, "after": after}}} for cell in (good, bad)]
    head, _, line = worst_table([*cells, made_cell("other", 0, 0.5, 0.5, 0.5)])[:3]
    assert head.startswith(
        "| encoder | attack | method | seeds | ASR above ASR-B | RA under BA | never attacked | BA lost |"
    )
    # CA 0.81, RA 0.79 and ASR-B 0.01 of the never-attacked encoder, BA 0.80 before
    assert line == "| e | a | m | 2 | 1.0 / 20.0 | 2.0 / 11.0 | 2.0 | 1.0 / 1.0 | 2 of 4 | 2 of 4 | 1 of 4 |"
    assert benchmark_tables(cells)[0] == head


def test_method_table_gives_means_and_spread():
    lines = method_table([made_cell("m", 0, 0.80, 0.02, 0.78), made_cell("m", 1, 0.78, 0.02, 0.78)])
    assert len(lines) == 3
    row = [part.strip() for part in lines[2].strip("|").split("|")]
    assert row[3:7] == ["m", "2", "79.0 ± 1.0 / 79.0 ± 1.0", "2.0 ± 0.0 / 2.0 ± 0.0"]
    assert row[10] == "ASR RA"  # BA fell by two points with one seed
    assert row[11] == "1,500"


@pytest.mark.parametrize(
    ("peers", "verdict"),
    [
        ({"p": (0.80, 0.70)}, "best"),
        ({"p": (0.80, 0.783)}, "tied"),  # within half a point
        ({"p": (0.80, 0.79)}, "behind"),
        ({"p": (0.70, 0.79)}, "best"),  # a better RA, bought with ten points of BA
        ({"oracle_trigger": (0.80, 0.79), "p": (0.80, 0.5)}, "best"),  # what nobody has is no rival
    ],
)
def test_ours_is_compared_at_equal_accuracy(peers, verdict):
    cells = [made_cell("mudjacking", 0, 0.80, 0.01, 0.78)]
    cells += [made_cell(name, 0, ba, 0.01, ra) for name, (ba, ra) in peers.items()]
    (line,) = ours_against_peers(cells)[2:]
    assert line.strip("| ").split(" | ")[-1] == verdict


def test_cells_are_read_in_the_order_of_their_numbers(tmp_path):
    for value in ("100", "32", "1200", "0.1", "0.05"):
        path = tmp_path / "e" / "a-0" / f"clean_inputs={value}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"method": value, "settings": {}}))
    assert [cell["method"] for cell in read_cells(tmp_path)] == ["0.05", "0.1", "32", "100", "1200"]


def test_attacks_are_drawn_side_by_side_where_there_are_more_of_them_than_of_methods(tmp_path):
    cells = [
        {**made_cell(m, s, 0.8, 0, 0.8), "attack": a}
        for a in ("a", "b")
        for m in ("none", "mudjacking")
        for s in (0, 1)
    ]
    assert "attacks-e-mudjacking.png" in {path.name for path in plot_benchmark(tmp_path, cells)}
    assert (tmp_path / "attacks-e-mudjacking.png").stat().st_size > 5000
    cells += [{**made_cell("peer", 0, 0.8, 0, 0.8), "attack": a} for a in ("a", "b")]
    assert not any(path.name.startswith("attacks-") for path in plot_benchmark(tmp_path, cells))


def test_pictures_are_drawn_of_what_there_is(tmp_path):
    points = [
        {"steps": n, "forward_equivalents": 10 * n, "seconds": n, "BA": 0.8, "ASR": 0.5, "RA": 0.5} for n in (1, 9)
    ]
    cells = [made_cell("mudjacking", 0, 0.8, 0, 0.8, curve=points), made_cell("none", 0, 0.8, 1, 0)]
    cells += [made_cell(f"clean_inputs={n}", 0, 0.8, 0, 0.8) for n in (10, 100)]
    names = {path.name for path in plot_benchmark(tmp_path, cells)}
    assert names == {"methods-e-a.png", "compute-e-a.png", "clean_inputs-e-a.png"}
    assert all((tmp_path / name).stat().st_size > 5000 for name in names)
    assert any("| 9 | 90 |" in line for line in benchmark_tables(cells))
    # Means, as the rates beside them
    dearer = [{**point, "forward_equivalents": 3 * point["forward_equivalents"]} for point in points]
    assert "| 9 | 180 |" in curve_table([cells[0], made_cell("mudjacking", 1, 0.8, 0, 0.8, curve=dearer)])[-1]


# ---- Command ----


def test_command_reads_a_nested_config_and_prints_tables(ran, folder, tmp_path, capsys):
    config = tmp_path / "plan.yaml"
    config.write_text(json.dumps({**ran[0], "methods": {"none": None}}))
    assert main(["benchmark", "--config", str(config), "--disable-tqdm"]) == 0
    assert "| vit | bad_encoder | digits/logistic | none | 1 |" in capsys.readouterr().out
    assert main(["benchmark", "--tables", str(folder / "cells"), "--disable-tqdm"]) == 0
    assert "| none |" in capsys.readouterr().out


def planned(arguments, monkeypatch):
    """The plan that a command line makes."""
    plans = []
    monkeypatch.setattr(benchmark, "run_benchmark", lambda plan, *args: plans.append(plan) or [])
    assert main(["benchmark", *arguments]) == 0
    return plans[0]


def test_a_list_on_the_command_line_picks_with_the_settings_of_the_plan(tmp_path, monkeypatch):
    """It ran them with default settings before, without a word."""
    config = tmp_path / "plan.yaml"
    methods = {"none": None, "mudjacking": {"max_steps": 7}, "slow": {"method": "mudjacking", "max_steps": 9}}
    config.write_text(json.dumps(plan_values(tmp_path, methods=methods)))
    plan = planned(["--config", str(config), "--methods", "[slow, mudjacking, official]"], monkeypatch)
    assert plan.methods == {"slow": methods["slow"], "mudjacking": methods["mudjacking"], "official": {}}
    assert planned(["--config", str(config), "--methods", "{none: }"], monkeypatch).methods == {"none": {}}
    quick = ["--quick", "--output-dir", str(tmp_path), "--methods", "[none, official]"]
    assert planned(quick, monkeypatch).methods["official"]["epochs"] == 40


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "missing: --output-dir"),
        (["--quick", "--attacks", "bad"], "bad"),
        (["--quick", "--processes", "0"], "--processes 0"),
        (["--tables", "nowhere"], "no json"),
        (["--quick", "--seeds", "0", "x"], "--seeds 0 x: whole numbers are needed"),
    ],
)
def test_command_explains_what_it_cannot_run(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["benchmark", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_patch_is_no_benchmark(capsys, tmp_path):
    (tmp_path / "_triggers" / "0").mkdir(parents=True)
    for path in (tmp_path / "mudjacking.json", tmp_path / "_triggers" / "0" / "trigger.json"):
        path.write_text("{}")
    assert main(["benchmark", "--tables", str(tmp_path)]) == 2
    assert "there is a patch; give the folder that a benchmark wrote" in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted((ROOT / "examples" / "benchmarks").glob("*.yaml")), ids=lambda path: path.stem)
def test_plans_of_the_repository(path):
    """Each is a plan, and its encoders can be built."""
    plan = BenchmarkPlan.from_values(yaml.safe_load(path.read_text()))
    assert plan.cells()
    for encoder in plan.encoders.values():
        if encoder.model is None:
            with torch.device("meta"):
                AutoModel.from_config(AutoConfig.for_model(encoder.model_type, **encoder.config))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"sweeps": {"trigger_placement": "anywhere"}},
            "`sweeps.trigger_placement` must be a list of values, not 'anywhere'",
        ),
        ({"sweeps": {"max_steps": 10}}, "`sweeps.max_steps` must be a list of values, not 10"),
        ({"sweeps": ["max_steps"]}, "`sweeps` must be a mapping"),
        ({"implant": [1]}, "`implant` must be a mapping"),
        ({"seeds": [0, 0]}, "`seeds` must be a list in which nothing stands twice"),
        ({"attacks": ["bad_encoder", "bad_encoder"]}, "`attacks` must be a list in which nothing stands twice"),
    ],
)
def test_shapes_of_a_plan(tmp_path, change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        BenchmarkPlan.from_values(plan_values(tmp_path, **change))


def test_missing_data_is_told_before_any_job_starts(tmp_path, capsys):
    plan = tmp_path / "plan.yaml"
    tasks = {"signs": {"dataset": str(tmp_path / "nowhere")}}
    plan.write_text(json.dumps(plan_values(tmp_path / "out", tasks=tasks)))
    assert main(["benchmark", "--config", str(plan), "--disable-tqdm"]) == 2
    error = capsys.readouterr().err
    assert "No dataset could be loaded from" in error
    assert "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_tables_of_a_benchmarks_own_folder(ran, folder, capsys):
    """Which holds encoders and implants besides."""
    assert main(["benchmark", "--tables", ran[0]["output_dir"]]) == 0
    assert "| vit | bad_encoder |" in capsys.readouterr().out


def test_command_explains_yaml_that_is_none(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["benchmark", "--quick", "--methods", "x: ["])
    assert "argument --methods: 'x: [' is not YAML" in capsys.readouterr().err
