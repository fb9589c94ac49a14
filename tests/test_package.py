# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
import json
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.version import Version

import hf_mudjacking


def _modules_after(code: str) -> set[str]:
    code = f"import sys, json\n{code}\nsys.stdout.write(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_import_loads_no_heavy_library():
    loaded = _modules_after("import hf_mudjacking; hf_mudjacking.__version__; dir(hf_mudjacking)")
    assert loaded.isdisjoint({"torch", "transformers", "datasets", "numpy", "PIL", "sklearn", "captum", "peft"})


def test_a_bug_instance_needs_no_torch():
    loaded = _modules_after("from hf_mudjacking import BugInstance; BugInstance('a', 'b')")
    assert loaded.isdisjoint({"torch", "transformers"})


@pytest.mark.parametrize("name", hf_mudjacking.__all__)
def test_every_public_name_resolves(name):
    assert getattr(hf_mudjacking, name) is not None


def test_names_come_from_their_modules():
    from hf_mudjacking.trainer import MudjackingTrainer
    from hf_mudjacking.triggers.patch import PatchTrigger

    assert hf_mudjacking.MudjackingTrainer is MudjackingTrainer
    assert hf_mudjacking.PatchTrigger is PatchTrigger
    assert dir(hf_mudjacking) == hf_mudjacking.__all__


def test_the_contract_of_the_design_is_public():
    contract = {"BugInstance", "MudjackingConfig", "MudjackingTrainer", "invert_trigger", "encode"}
    assert contract <= set(hf_mudjacking.__all__)


def test_unknown_name():
    with pytest.raises(AttributeError, match="has no attribute 'Mudjacker'"):
        _ = hf_mudjacking.Mudjacker


def test_version_is_one():
    assert len(Version(hf_mudjacking.__version__).release) == 3


def test_package_is_typed_and_every_file_has_the_licence_line():
    root = Path(hf_mudjacking.__file__).parent
    assert (root / "py.typed").exists()
    for path in root.rglob("*.py"):
        assert path.read_text(encoding="utf-8").startswith("# Copyright 2026 The hf-mudjacking authors."), path
