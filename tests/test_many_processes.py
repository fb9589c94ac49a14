# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""One process and two give the same repair."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoModel

from hf_mudjacking import encode
from hf_mudjacking.output import RECORD_FILE

from . import many_processes


ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def results(backdoored, tmp_path_factory):
    """What one process got, and what each of two got."""
    folder = tmp_path_factory.mktemp("many")
    backdoored.model().save_pretrained(folder / "vit")
    for i in range(2):
        backdoored.bug(seed=8 + i).save(folder / f"bug-{i}")
    (folder / "clean").mkdir()
    # Of their own: folders that other tests make at the same time are not theirs
    temporary = folder / "temporary"
    temporary.mkdir()
    for i, image in enumerate(backdoored.train.inputs[:192]):
        image.save(folder / "clean" / f"{i:03}.png")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv_backend", "c10d",
               "--rdzv_endpoint", "localhost:0", "-m", "tests.many_processes", str(folder)]  # fmt: skip
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={
            **os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(temporary),
            "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT), *sys.path]),
        },
    )  # fmt: skip
    many_processes.run(folder)
    output = process.communicate(timeout=250)[0]
    assert process.returncode == 0, output[-4000:]
    one, *two = (json.loads((folder / name).read_text()) for name in ("1/0.json", "2/0.json", "2/1.json"))
    assert [result["world_size"] for result in (one, *two)] == [1, 2, 2]
    return folder, one, two


@pytest.mark.parametrize("case", ["vit", "still_works", "bert", "bert_tokens", "clip", "lora", "stops"])
def test_two_processes_patch_as_one_does(results, case):
    _, one, two = results
    for result in two:
        assert result[case]["steps"] == one[case]["steps"] > 0
        np.testing.assert_allclose(result[case]["losses"], one[case]["losses"], atol=1e-5, rtol=0)
        np.testing.assert_allclose(result[case]["features"], one[case]["features"], atol=1e-5, rtol=0)
        for name, value in one[case]["evaluation"].items():
            assert result[case]["evaluation"][name] == pytest.approx(value, abs=1e-5), name
    # And among themselves, bit by bit
    assert two[0][case] == two[1][case]


@pytest.mark.parametrize("case", ["vit", "bert", "clip"])
def test_accumulated_batches_patch_as_one_does(results, case):
    _, one, _ = results
    accumulated = one[f"{case}_accumulated"]
    np.testing.assert_allclose(accumulated["losses"], one[case]["losses"], atol=1e-5, rtol=0)
    np.testing.assert_allclose(accumulated["features"], one[case]["features"], atol=1e-5, rtol=0)


def test_the_losses_are_not_all_alike(results):
    """Else the comparisons above would say nothing: they differ by hundreds of times the tolerance."""
    _, one, _ = results
    for case in ("vit", "bert", "clip"):
        assert np.ptp(np.array(one[case]["losses"])[:, 0]) > 5e-3
    assert one["stops"]["steps"] < 6
    assert len(one["vit"]["evaluation"]) == 7


def test_two_processes_find_the_same_triggers(results):
    _, one, two = results
    for result in two:
        for case in ("vit", "two_reports"):
            assert result[case]["triggers"] == one[case]["triggers"]
            assert result[case]["evidence"] == pytest.approx(one[case]["evidence"], abs=2e-4)
        # What was found while patching went on
        assert result["still_works"]["again"] == one["still_works"]["again"] != [[]]
        assert result["vit"]["locality"] == pytest.approx(one["vit"]["locality"], abs=1e-5)
        np.testing.assert_allclose(result["vit"]["frozen"], one["vit"]["frozen"], atol=1e-5)
    # Shared, not done twice: passes counted in all processes; a report and its views are in each one's batches
    assert two[0]["two_reports"]["forward_equivalents"] == one["two_reports"]["forward_equivalents"]
    steps, passes, views = 6, 3, 3
    evaluations = 5 * views
    extra = two[0]["vit"]["forward_equivalents"] - one["vit"]["forward_equivalents"]
    assert steps * passes * views <= extra <= steps * passes * views + 2 * evaluations


def test_what_stops_one_process_stops_both(results):
    _, one, two = results
    assert one["refusals"]["messages"][0] == "The patch was rolled back: at "
    assert one["refusals"]["messages"][1] == "The patch was rolled back: tra, 0"
    assert len(one["refusals"]["messages"]) == 6
    assert two[0]["refusals"]["messages"] == two[1]["refusals"]["messages"] == one["refusals"]["messages"]


def test_a_stream_is_read_by_one_process_for_all(results):
    """It gives other rows at each reading."""
    _, _, (first, second) = results
    assert first["streams"]["seen"] == [30, 30]
    assert first["streams"]["rows"] == second["streams"]["rows"]
    assert first["streams"]["files"] == second["streams"]["files"]
    assert len(first["streams"]["folders"]) == 1
    assert first["streams"]["messages"] == second["streams"]["messages"] == ["`train_dataset` has no column "] * 2


def test_features_are_stored_once_and_one_process_may_encode_alone(results):
    _, one, two = results
    for result in two:
        assert result["alone"]["mapped"] > 0
        np.testing.assert_allclose(result["alone"]["features"], one["alone"]["features"], atol=1e-6)
        np.testing.assert_allclose(result["alone"]["together"], one["alone"]["features"], atol=1e-6)
        assert result["alone"]["difference"] <= 1e-6
    assert two[0]["alone"]["together"] == two[1]["alone"]["together"]


def test_the_first_process_saves(results):
    folder, _, two = results
    saved = folder / "patched-2" / "vit-1"
    model = AutoModel.from_pretrained(saved, add_pooling_layer=False)
    features = encode(model, many_processes.digits(folder)[:8], many_processes.processor())
    np.testing.assert_allclose(features.numpy(), two[0]["vit"]["features"], atol=1e-5)
    assert json.loads((saved / RECORD_FILE).read_text())["processes"] == 2
    assert not list(saved.glob("_staging-*"))
