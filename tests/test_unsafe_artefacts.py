# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""Files from strangers: nothing in them is run, nothing outside their folder is read, nothing huge is taken into memory."""

import copy
import json
import os
import pickle
import shutil
import struct
import zlib

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from hf_mudjacking import BugInstance, MudjackingTrainer, TextTrigger, load_trigger
from hf_mudjacking.bug_instance import load_image
from hf_mudjacking.cli import main
from hf_mudjacking.delta import DELTA_FILE, Delta
from hf_mudjacking.loading import load_model, load_processor
from hf_mudjacking.patch_record import load_record
from hf_mudjacking.patches import apply_patch, compared, save_delta
from hf_mudjacking.remembered import load_remembered, load_reported_triggers
from hf_mudjacking.safe_loading import MAX_JSON_BYTES, MAX_TRIGGER_BYTES, inside, open_tensors
from hf_mudjacking.sentence_layout import SentenceLayout
from hf_mudjacking.triggers import square_patch
from hf_mudjacking.weight_files import WeightFiles, with_adapter

from .conftest import make_config, make_dataset, make_images


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return (open, (self.marker, "w"))


@pytest.fixture
def marker(tmp_path):
    """A file that must not be there at the end."""
    path = tmp_path / "payload-was-run"
    with open(tmp_path / "proof", "wb") as file:
        pickle.dump(Payload(path), file)
    pickle.loads((tmp_path / "proof").read_bytes()).close()
    assert path.exists(), "the payload works"
    path.unlink()
    yield path
    assert not path.exists()


def _poison(path, marker, how):
    """Replace a file by a pickle that runs code."""
    if how == "torch":
        torch.save({"weight": Payload(marker)}, path)
    else:
        path.write_bytes(pickle.dumps({"weight": Payload(marker)}, protocol=4))


def _sparse(path, size):
    """A file of a huge size that takes no room on disk."""
    with open(path, "wb") as file:
        file.truncate(size)


def _claims(path, shape):
    """A safetensors file whose header claims more than there is."""
    size = 4 * int(np.prod(shape, dtype=object))
    header = json.dumps({"mask": {"dtype": "F32", "shape": shape, "data_offsets": [0, size]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))


def _huge_header(path):
    path.write_bytes(struct.pack("<Q", 2**62) + b"{}")


def _cut(path):
    path.write_bytes(path.read_bytes()[:-7])


def _nested(path):
    path.write_text('{"a":' * 100_000 + "1" + "}" * 100_000)


def _number(path):
    path.write_text('{"a": ' + "9" * 100_000 + "}")


def _giant(path):
    _sparse(path, MAX_JSON_BYTES + 1)


def _link_out(path):
    secret = path.parent.parent / f"secret-{path.name}"
    path.rename(secret)
    path.symlink_to(secret)


def _pipe(path):
    """Opening it would wait for ever."""
    path.unlink()
    os.mkfifo(path)


_BAD_JSON = [_nested, _number, _giant, _link_out, _pipe]
_BAD_TENSORS = [
    lambda path: _claims(path, [10**6, 10**6]),
    lambda path: _claims(path, [2**40, 2**40]),
    _huge_header,
    _cut,
    _link_out,
    _pipe,
]


# ---- Triggers ----


@pytest.mark.parametrize("damage", _BAD_JSON)
def test_triggers_with_a_bad_description(tmp_path, damage):
    square_patch((16, 16), 4).save_pretrained(tmp_path / "trigger")
    damage(tmp_path / "trigger" / "trigger.json")
    with pytest.raises(ValueError, match="holds no readable trigger"):
        load_trigger(tmp_path / "trigger")


@pytest.mark.parametrize("damage", [*_BAD_TENSORS, lambda path: _sparse(path, MAX_TRIGGER_BYTES + 1)])
def test_triggers_with_bad_tensors(tmp_path, damage):
    square_patch((16, 16), 4).save_pretrained(tmp_path / "trigger")
    damage(tmp_path / "trigger" / "trigger.safetensors")
    with pytest.raises(ValueError, match="holds no readable trigger"):
        load_trigger(tmp_path / "trigger")


@pytest.mark.parametrize("how", ["torch", "pickle"])
def test_triggers_that_are_pickles(tmp_path, marker, how):
    square_patch((16, 16), 4).save_pretrained(tmp_path / "trigger")
    _poison(tmp_path / "trigger" / "trigger.safetensors", marker, how)
    with pytest.raises(ValueError, match="is a pickle, which can run code when it is loaded; it was not opened"):
        load_trigger(tmp_path / "trigger")


@pytest.mark.parametrize(
    "content",
    [
        {"kind": ["patch"]},
        {"kind": "patch", "fields": []},
        {"kind": "patch", "fields": {"placement": {}}},
        {"kind": "text", "fields": {"spans": 3, "position": None, "replaces": False}},
        {"kind": "text", "fields": {"spans": ["a"], "position": "0", "replaces": False}},
        {"kind": "text", "fields": {"spans": ["a"], "position": 0, "replaces": "no"}},
        {"kind": "warp"},
    ],
)
def test_triggers_of_the_wrong_types(tmp_path, content):
    trigger = TextTrigger("cf") if content["kind"] == "text" else square_patch((16, 16), 4)
    trigger.save_pretrained(tmp_path)
    (tmp_path / "trigger.json").write_text(json.dumps(content))
    with pytest.raises(ValueError):
        load_trigger(tmp_path)


def test_triggers_with_tensors_that_numpy_has_not(tmp_path):
    square_patch((16, 16), 4).save_pretrained(tmp_path)
    tensors = {"mask": torch.ones(2, 2, dtype=torch.bfloat16), "pattern": torch.ones(2, 2, 3, dtype=torch.bfloat16)}
    save_file(tensors, tmp_path / "trigger.safetensors")
    with pytest.raises(ValueError, match="holds no readable trigger"):
        load_trigger(tmp_path)


# ---- Bug reports and pictures ----


def _bug_folder(place):
    red, blue = (Image.new("RGB", (8, 8), color) for color in ("red", "blue"))
    BugInstance(red, blue).save(place)
    return place


@pytest.mark.parametrize("damage", _BAD_JSON)
def test_reports_with_a_bad_description(tmp_path, damage):
    damage(_bug_folder(tmp_path / "bug") / "bug.json")
    with pytest.raises(ValueError, match=r"bug\.json"):
        BugInstance.load(tmp_path / "bug")


@pytest.mark.parametrize("damage", [lambda path: path.write_bytes(path.read_bytes()[:50]), _link_out, _pipe])
def test_reports_with_a_bad_picture(tmp_path, damage):
    damage(_bug_folder(tmp_path / "bug") / "reference.png")
    with pytest.raises(ValueError, match=r"reference\.png"):
        BugInstance.load(tmp_path / "bug")


def test_reports_that_name_pictures_elsewhere(tmp_path):
    Image.new("RGB", (8, 8), "green").save(tmp_path / "secret.png")
    _bug_folder(tmp_path / "bug")
    for name in ("../secret.png", str(tmp_path / "secret.png")):
        record = {"modality": "image", "misclassified": name, "reference": "reference.png"}
        (tmp_path / "bug" / "bug.json").write_text(json.dumps(record))
        with pytest.raises(ValueError, match="no image file at"):
            BugInstance.load(tmp_path / "bug")


def _png(width, height):
    """A PNG that claims a size; its pixels are zeros, of which a gigabyte packs into a megabyte."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("size", [(10_000, 10_000), (60_000, 60_000), (2**31 - 1, 2**31 - 1)])
def test_pictures_that_unpack_to_gigabytes(tmp_path, size):
    """The first lies below the size at which Pillow refuses."""
    path = _bug_folder(tmp_path / "bug") / "misclassified.png"
    path.write_bytes(_png(*size))
    for load in (lambda: load_image(path), lambda: BugInstance.load(tmp_path / "bug")):
        with pytest.raises(ValueError, match=r"misclassified\.png` could not be decoded"):
            load()


def test_pictures_that_are_programs(tmp_path):
    """Pillow would hand PostScript to Ghostscript, whatever the file is called."""
    Image.new("RGB", (8, 8)).save(tmp_path / "x.eps")
    (tmp_path / "x.eps").rename(tmp_path / "x.png")
    assert Image.open(tmp_path / "x.png").format == "EPS"
    with pytest.raises(ValueError, match=r"x\.png` could not be decoded"):
        load_image(tmp_path / "x.png")


def test_texts_of_gigabytes(tmp_path):
    (tmp_path / "right.txt").write_text("a text")
    _sparse(tmp_path / "wrong.txt", MAX_JSON_BYTES + 1)
    with pytest.raises(ValueError, match="it was not read"):
        BugInstance.from_files(tmp_path / "wrong.txt", tmp_path / "right.txt")


# ---- Names and links ----


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc/passwd", "..\\x", "C:\\x", "\\\\server\\x", "C:x"])
def test_names_that_lead_out(tmp_path, name):
    with pytest.raises(ValueError, match="leads out of the folder"):
        inside(tmp_path, name)


def test_links_within_a_folder_and_its_cache_are_followed(tmp_path):
    (tmp_path / "here").write_text("")
    (tmp_path / "link").symlink_to("here")
    assert inside(tmp_path, "link") == tmp_path.resolve() / "link"
    snapshot = tmp_path / "models--a--b" / "snapshots" / "c"
    snapshot.mkdir(parents=True)
    (snapshot.parent.parent / "blobs").mkdir()
    (snapshot.parent.parent / "blobs" / "x").write_text("")
    (snapshot / "x").symlink_to("../../blobs/x")
    inside(snapshot, "x")
    (snapshot / "report").mkdir()
    (snapshot / "report" / "x").symlink_to("../../../blobs/x")
    inside(snapshot / "report", "x")
    (snapshot / "y").symlink_to("../../../here")
    with pytest.raises(ValueError, match="is a link to"):
        inside(snapshot, "y")


# ---- Records and patches ----


@pytest.fixture(scope="module")
def made(_tiny_vit, processor, tmp_path_factory):
    """A model, and a full, a LoRA and a delta patch of it; the parts are made without training."""
    root = tmp_path_factory.mktemp("made")
    _tiny_vit.save_pretrained(root / "base")
    processor.save_pretrained(root / "base")
    edited = AutoModel.from_pretrained(root / "base")
    with torch.no_grad():
        edited.embeddings.position_embeddings[0, 3] += 1
        edited.layernorm.weight += 1
    edited.save_pretrained(root / "full")
    record = save_delta(root / "base", root / "full", root / "delta")
    (root / "full" / "mudjacking.json").write_text(json.dumps({**record, "kind": "full"}))
    model = get_peft_model(
        AutoModel.from_pretrained(root / "base"), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    )
    model.save_pretrained(root / "lora")
    (root / "lora" / "mudjacking.json").write_text(json.dumps({**record, "kind": "lora"}))
    square_patch((16, 16), 4).save_pretrained(root / "full" / "_triggers" / "0")
    return root


@pytest.fixture
def copies(made, tmp_path):
    shutil.copytree(made, tmp_path / "made")
    return tmp_path / "made"


def _refused(patch, base, out, message, capsys):
    """`mudjack apply` refuses, in one line, and writes nothing."""
    assert main(["apply", str(patch), "--to", str(base), "--output-dir", str(out)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not out.exists() or list(out.iterdir()) == []


def test_the_sound_patches_apply(made, tmp_path):
    for kind in ("full", "lora", "delta"):
        apply_patch(made / kind, made / "base", tmp_path / kind)


@pytest.mark.parametrize("damage", _BAD_JSON)
def test_bad_records(copies, tmp_path, damage, capsys):
    damage(copies / "full" / "mudjacking.json")
    with pytest.raises(ValueError, match=r"mudjacking\.json"):
        load_record(copies / "full")
    _refused(copies / "full", copies / "base", tmp_path / "out", "mudjacking.json", capsys)


@pytest.mark.parametrize("kind", ["full", "lora", "delta"])
@pytest.mark.parametrize("damage", _BAD_TENSORS)
def test_patches_with_bad_tensors(copies, tmp_path, kind, damage, capsys):
    name = {"full": "model.safetensors", "lora": "adapter_model.safetensors", "delta": DELTA_FILE}[kind]
    damage(copies / kind / name)
    _refused(copies / kind, copies / "base", tmp_path / "out", name, capsys)


@pytest.mark.parametrize("kind", ["full", "lora", "delta"])
@pytest.mark.parametrize("how", ["torch", "pickle"])
def test_patches_that_are_pickles(copies, tmp_path, marker, kind, how, capsys):
    name = {"full": "model.safetensors", "lora": "adapter_model.safetensors", "delta": DELTA_FILE}[kind]
    _poison(copies / kind / name, marker, how)
    _refused(copies / kind, copies / "base", tmp_path / "out", "is a pickle", capsys)


def test_links_out_of_a_patch_are_not_copied_along(copies, tmp_path, capsys):
    (tmp_path / "id_rsa").write_text("secret")
    (copies / "full" / "merges.txt").symlink_to(tmp_path / "id_rsa")
    _refused(copies / "full", copies / "base", tmp_path / "out", "is a link to", capsys)
    with pytest.raises(ValueError, match="is a link to"):
        load_model(copies / "full")
    (copies / "full" / "merges.txt").unlink()
    (copies / "full" / "1_Pooling").symlink_to(tmp_path, target_is_directory=True)
    _refused(copies / "full", copies / "base", tmp_path / "out", "is a link to", capsys)


def test_links_that_go_round_in_circles(copies, tmp_path, capsys):
    (copies / "full" / "merges.txt").symlink_to("merges.txt")
    _refused(copies / "full", copies / "base", tmp_path / "out", "is neither a file nor a folder", capsys)


def test_nothing_is_written_through_the_links_of_a_received_patch(copies, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    for name in ("thesis.txt", "trigger.json"):
        (tmp_path / "mine" / name).write_text("mine")
    shutil.rmtree(copies / "delta" / "_triggers", ignore_errors=True)
    (copies / "delta" / "_triggers").mkdir()
    (copies / "delta" / "_triggers" / "0").symlink_to(tmp_path / "mine")
    before = {path.name for path in (copies / "delta").iterdir()}
    for patch in ("full", "lora"):
        assert (
            main(["apply", str(copies / patch), "--to", str(copies / "base"), "--output-dir", str(copies / "delta")])
            == 2
        )
        assert "nothing is written through links" in capsys.readouterr().err
    assert {path.name: path.read_text() for path in (tmp_path / "mine").iterdir()} == {
        "thesis.txt": "mine",
        "trigger.json": "mine",
    }
    assert {path.name for path in (copies / "delta").iterdir()} == before


def test_headers_that_begin_like_a_pickle(tmp_path):
    """Their length is the first thing in a safetensors file."""
    found = 0
    for length in range(500, 1500):
        save_file({"a": torch.zeros(2)}, tmp_path / "a.safetensors", metadata={"k": "x" * length})
        found += (
            (tmp_path / "a.safetensors").read_bytes().startswith((b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"))
        )
        assert list(open_tensors(tmp_path / "a.safetensors").keys()) == ["a"]
    assert found


def test_triggers_of_a_patch_that_are_links(copies, tmp_path):
    shutil.move(copies / "full" / "_triggers" / "0", tmp_path / "elsewhere")
    (copies / "full" / "_triggers" / "remembered-0").symlink_to(tmp_path / "elsewhere")
    (copies / "full" / "_triggers" / "0").symlink_to(tmp_path / "elsewhere")
    (copies / "full" / "_triggers" / "remembered-x").mkdir()
    with pytest.raises(ValueError, match="is a link to"):
        load_remembered(copies / "full")
    with pytest.raises(ValueError, match="is a link to"):
        load_reported_triggers(copies / "full", 1)


# ---- Deltas ----


def _edit_delta(folder, change):
    """Write a delta anew, its metadata or tensors changed."""
    delta = Delta(folder)
    described = {name: vars(value) for name, value in delta.changes.items()}
    tensors = load_file(folder / DELTA_FILE)
    described = change(described, tensors) or described
    metadata = {"format": "mudjacking-delta-1", "tensors": json.dumps(described)}
    save_file(tensors, folder / DELTA_FILE, metadata=metadata)


_POSITIONS, _NORM = "embeddings.position_embeddings", "layernorm.weight"


def _huge_shape(described, tensors):
    described["new"] = {**described[_NORM], "base": None, "base_sha256": None, "shape": [2**40], "sparse": True}
    tensors["xor:new"] = torch.zeros(1, dtype=torch.int32)
    tensors["rows:new"] = torch.zeros(1, dtype=torch.int64)


def _flipped_bit(described, tensors):
    tensors[f"xor:{_NORM}"][5] ^= 1


def _other_dtype(described, tensors):
    described[_NORM]["patched"] = "load"


def _no_tensor(described, tensors):
    del tensors[f"xor:{_NORM}"]


def _wrong_integers(described, tensors):
    tensors[f"xor:{_NORM}"] = tensors[f"xor:{_NORM}"].to(torch.int64)


def _wrong_shape(described, tensors):
    tensors[f"xor:{_NORM}"] = tensors[f"xor:{_NORM}"][:3].clone()


def _rows_outside(described, tensors):
    described[_NORM]["sparse"] = True
    tensors[f"xor:{_NORM}"] = tensors[f"xor:{_NORM}"][:1].clone()
    tensors[f"rows:{_NORM}"] = torch.tensor([10**9])


def _unknown_field(described, tensors):
    described[_NORM]["run"] = "rm"


def _no_object(described, tensors):
    return [1, 2]


@pytest.mark.parametrize(
    "change",
    [_huge_shape, _flipped_bit, _other_dtype, _no_tensor, _wrong_integers, _wrong_shape, _rows_outside,
     _unknown_field, _no_object],
    ids=lambda change: change.__name__.strip("_"),
)  # fmt: skip
def test_deltas_that_lie(copies, tmp_path, change, capsys):
    _edit_delta(copies / "delta", change)
    _refused(copies / "delta", copies / "base", tmp_path / "out", "is damaged", capsys)


def test_deltas_of_a_format_to_come(copies, tmp_path, capsys):
    save_file(load_file(copies / "delta" / DELTA_FILE), copies / "delta" / DELTA_FILE, metadata={"format": "9"})
    _refused(copies / "delta", copies / "base", tmp_path / "out", "is of format `9`", capsys)


def test_a_delta_does_not_load_as_a_model(made):
    with pytest.raises(ValueError, match="it is a delta, no model; `mudjack apply` makes one of it"):
        load_model(made / "delta")


# ---- Adapters ----


@pytest.mark.parametrize("loader", ["apply", "load_model", "hub"])
@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"megatron_config": {"a": 1}, "megatron_core": "evil"}, "sets `megatron_config`"),
        ({"layer_replication": [[0, 10**9]]}, "sets `layer_replication`"),
        ({"corda_config": {"cache_file": "x"}}, "sets `corda_config`"),
        ({"monteclora_config": {"num_samples": 10**9}}, "sets `monteclora_config`"),
        ({"trainable_token_indices": [0] * 10**6}, "claims embeddings of 1,000,000 tokens"),
        ({"trainable_token_indices": {"x": [0] * 10**6}}, "claims embeddings of 1,000,000 tokens"),
        ({"r": 10**9}, "claims the ranks [1000000000]"),
        ({"rank_pattern": {".*": 10**9}}, "claims the ranks [2, 1000000000]"),
        ({"r": "many"}, "claims the ranks"),
        ({"peft_type": "LOHA", "r": 10**6}, "claims the ranks [1000000]"),
        ({"peft_type": "XLORA", "adapters": {"0": "/elsewhere"}}, "of an adapter of the kind `XLORA`"),
        (
            {"peft_type": "MULTITASK_PROMPT_TUNING", "prompt_tuning_init_state_dict_path": "/elsewhere/x.bin"},
            "only IA3, LOHA, LOKR, LORA are read",
        ),
    ],
)
def test_adapters_that_reach_too_far(copies, tmp_path, setting, message, loader, capsys, monkeypatch):
    path = copies / "lora" / "adapter_config.json"
    path.write_text(
        json.dumps({**json.loads(path.read_text()), **setting, "base_model_name_or_path": str(copies / "base")})
    )
    if loader == "apply":
        _refused(copies / "lora", copies / "base", tmp_path / "out", message, capsys)
        return
    if loader == "hub":
        # From the cache alone
        monkeypatch.setattr(
            "hf_mudjacking.loading.cached_file",
            lambda name, file, **kwargs: str(copies / name / file) if (copies / name / file).is_file() else None,
        )
        monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError) as error:
        load_model("lora" if loader == "hub" else copies / "lora")
    assert message in str(error.value)


def test_a_flat_tensor_has_no_rank(copies, tmp_path, capsys):
    """It could claim any in a few bytes."""
    path = copies / "lora" / "adapter_model.safetensors"
    for padding in (torch.zeros(400_000, dtype=torch.uint8), torch.zeros(400_000, 1, dtype=torch.uint8)):
        save_file({**load_file(path), "lora_A.x": padding}, path)
        config = copies / "lora" / "adapter_config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), "r": 400_000}))
        _refused(copies / "lora", copies / "base", tmp_path / "out", "claims the ranks [400000]", capsys)


def test_adapters_that_lack_tensors(copies, tmp_path, capsys):
    path = copies / "lora" / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors.pop(min(tensors))
    save_file(tensors, path)
    _refused(copies / "lora", copies / "base", tmp_path / "out", "missing adapter keys", capsys)


@pytest.mark.parametrize("how", ["torch", "pickle"])
def test_adapters_that_are_pickles(copies, marker, how):
    (copies / "lora" / "adapter_model.safetensors").unlink()
    _poison(copies / "lora" / "adapter_model.bin", marker, how)
    config = copies / "lora" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": str(copies / "base")}))
    for load in (
        lambda: load_model(copies / "lora"),
        lambda: with_adapter(load_model(copies / "base"), copies / "lora"),
        lambda: WeightFiles(copies / "lora"),
        lambda: compared(copies / "base", copies / "lora").__enter__(),
    ):
        with pytest.raises(ValueError, match=r"adapter_model\.bin` is a pickle, which can run code"):
            load()


def test_an_adapter_on_the_hub_that_is_a_pickle(copies, tmp_path, marker, monkeypatch):
    """In the cache, as a download would leave it; transformers would fall back to the pickle."""
    repo = tmp_path / "cache" / "models--org--adapter"
    snapshot = repo / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("a" * 40)
    config = json.loads((copies / "lora" / "adapter_config.json").read_text())
    (snapshot / "adapter_config.json").write_text(
        json.dumps({**config, "base_model_name_or_path": str(copies / "base")})
    )
    _poison(snapshot / "adapter_model.bin", marker, "torch")
    with pytest.raises(ValueError, match=r"`adapter_model\.bin` is a pickle"):
        load_model("org/adapter", cache_dir=str(tmp_path / "cache"))


# ---- Models ----


@pytest.mark.parametrize("how", ["torch", "pickle"])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_models_that_are_pickles(copies, marker, how, name):
    (copies / "base" / "model.safetensors").unlink()
    _poison(copies / "base" / name, marker, how)
    with pytest.raises(ValueError, match="No model could be loaded from"):
        load_model(copies / "base")
    with pytest.raises(ValueError, match="is a pickle, which can run code"):
        WeightFiles(copies / "base")
    if name == "pytorch_model.bin":
        with pytest.raises(ValueError, match=r"`pytorch_model\.bin` is a pickle.*save_pretrained\(folder\)"):
            load_model(copies / "base")
        with pytest.raises(ValueError, match="is a pickle"):
            load_model(copies / "base", use_safetensors=False)


def test_a_pickle_beside_safetensors_is_not_looked_at(copies, marker):
    _poison(copies / "base" / "pytorch_model.bin", marker, "torch")
    load_model(copies / "base")


@pytest.mark.parametrize("damage", _BAD_TENSORS[:4])
def test_models_with_bad_tensors(copies, damage):
    damage(copies / "base" / "model.safetensors")
    for load in (load_model, WeightFiles):
        with pytest.raises(ValueError):
            load(copies / "base")


@pytest.mark.parametrize(
    ("place", "message"),
    [("../secret.safetensors", "leads out"), ("/etc/passwd", "leads out"), ("x.bin", "no safetensors file")],
)
def test_an_index_that_names_other_files(copies, place, message):
    os.rename(copies / "base" / "model.safetensors", copies / "secret.safetensors")
    index = {"metadata": {}, "weight_map": {"layernorm.bias": place}}
    (copies / "base" / "model.safetensors.index.json").write_text(json.dumps(index))
    for load in (load_model, WeightFiles):
        with pytest.raises(ValueError, match=message):
            load(copies / "base")
    (copies / "base" / "model.safetensors.index.json").write_text('{"weight_map": [1]}')
    with pytest.raises(ValueError, match="has no `weight_map`"):
        load_model(copies / "base")


@pytest.mark.parametrize(
    ("name", "place", "message"),
    [
        ("x.safetensors.index.json", "../secret.safetensors", "leads out"),
        ("../x.safetensors.index.json", "y.safetensors", "leads out"),
        ("adapter_model.bin", None, "only safetensors are read"),
        (["x.safetensors"], None, "only safetensors are read"),
    ],
)
def test_a_configuration_that_names_other_weights(copies, name, place, message):
    """transformers reads the index that it names, and follows what stands in that."""
    shutil.copyfile(copies / "base" / "model.safetensors", copies / "secret.safetensors")
    config = json.loads((copies / "base" / "config.json").read_text())
    (copies / "base" / "config.json").write_text(json.dumps({**config, "transformers_weights": name}))
    if place is not None:
        tensors = load_file(copies / "secret.safetensors")
        index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, place)}
        (copies / "base" / name).write_text(json.dumps(index))
    for load in (load_model, WeightFiles):
        with pytest.raises(ValueError, match=message):
            load(copies / "base")


def test_a_configuration_that_names_its_own_weights(copies):
    os.rename(copies / "base" / "model.safetensors", copies / "base" / "x.safetensors")
    config = json.loads((copies / "base" / "config.json").read_text())
    (copies / "base" / "config.json").write_text(json.dumps({**config, "transformers_weights": "x.safetensors"}))
    load_model(copies / "base")


def test_models_that_bring_code(copies, marker):
    (copies / "base" / "modeling_evil.py").write_text(f"open({str(marker)!r}, 'w')\n")
    config = json.loads((copies / "base" / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "modeling_evil.C", "AutoModel": "modeling_evil.M"}}
    (copies / "base" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        load_model(copies / "base")


def test_processors_that_bring_code(copies, marker):
    model = load_model(copies / "base")
    (copies / "base" / "evil.py").write_text(f"open({str(marker)!r}, 'w')\n")
    path = copies / "base" / "preprocessor_config.json"
    config = {
        **json.loads(path.read_text()),
        "image_processor_type": "Evil",
        "auto_map": {"AutoImageProcessor": "evil.P"},
    }
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        load_processor(copies / "base", model)


# ---- Files of sentence-transformers ----


@pytest.fixture
def sentence_files(tmp_path):
    folder = tmp_path / "sentences"
    (folder / "1_Pooling").mkdir(parents=True)
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    (folder / "modules.json").write_text(
        json.dumps([{"type": "x.Transformer", "path": ""}, {"type": "x.Pooling", "path": "1_Pooling"}])
    )
    assert SentenceLayout.read(folder).pooling == "mean"
    return folder


def _pooling_elsewhere(folder):
    shutil.move(folder / "1_Pooling", folder.parent / "elsewhere")
    modules = [{"type": "x.Transformer", "path": ""}, {"type": "x.Pooling", "path": "../elsewhere"}]
    (folder / "modules.json").write_text(json.dumps(modules))


def _pooling_link(folder):
    shutil.move(folder / "1_Pooling", folder.parent / "elsewhere")
    (folder / "1_Pooling").symlink_to(folder.parent / "elsewhere")


def _config_link(folder):
    """As a way to have a file of the user's copied along with the model."""
    (folder / "1_Pooling" / "config.json").unlink()
    (folder / "1_Pooling" / "config.json").symlink_to("/etc/hostname")


@pytest.mark.parametrize(
    "damage",
    [
        _pooling_elsewhere,
        _pooling_link,
        lambda folder: _giant(folder / "modules.json"),
        lambda folder: _nested(folder / "1_Pooling" / "config.json"),
        _config_link,
    ],
)
def test_bad_layouts(sentence_files, damage):
    damage(sentence_files)
    with pytest.raises(ValueError, match=r"leads out|is a link|names no transformer with a readable pooling"):
        SentenceLayout.read(sentence_files)


# ---- Checkpoints ----


@pytest.fixture(scope="module")
def trainer_in(_tiny_vit, processor):
    """Builds the same small run in any folder."""
    trigger = square_patch((16, 16), 4)
    x_b, x_r = make_images(2, seed=100)
    bug, dataset = BugInstance(trigger.apply(x_b), x_r), make_dataset(make_images(8))

    def build(folder):
        args = make_config(folder, max_steps=2, save_strategy="steps", save_steps=1)
        return MudjackingTrainer(
            copy.deepcopy(_tiny_vit), args, [bug], dataset, processing_class=processor, triggers=[trigger]
        )

    return build


@pytest.fixture(scope="module")
def finished_run(trainer_in, tmp_path_factory):
    root = tmp_path_factory.mktemp("run")
    trainer_in(root).train()
    return root


@pytest.fixture
def run(finished_run, tmp_path):
    """A copy of a run with two checkpoints."""
    return shutil.copytree(finished_run, tmp_path / "run")


@pytest.mark.parametrize("how", ["torch", "pickle"])
@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "pytorch_model.bin"])
def test_checkpoints_that_run_code(run, trainer_in, marker, name, how):
    checkpoint = run / "checkpoint-1"
    if name == "pytorch_model.bin":
        (checkpoint / "model.safetensors").unlink()
    _poison(checkpoint / name, marker, how)
    trainer = trainer_in(run)
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    with pytest.raises(ValueError, match=r"is a pickle|is no whole file of `torch\.save`"):
        trainer.train(resume_from_checkpoint=str(checkpoint))
    assert all(torch.equal(before[name], p) for name, p in trainer.model.named_parameters())


@pytest.mark.parametrize("name", ["optimizer.pt", "rng_state.pth"])
def test_checkpoints_that_are_cut(run, trainer_in, name):
    path = run / "checkpoint-2" / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"checkpoint-2/\w+\.pth?` is no whole file of `torch\.save`"):
        trainer_in(run).train(resume_from_checkpoint=True)


def test_a_giant_state_is_no_complete_checkpoint(run, trainer_in):
    _giant(run / "checkpoint-2" / "trainer_state.json")
    with pytest.raises(ValueError, match="checkpoint-2` is no complete checkpoint"):
        trainer_in(run).train(resume_from_checkpoint=str(run / "checkpoint-2"))
