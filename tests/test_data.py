# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
import argparse
import io

import datasets
import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from hf_mudjacking import BugInstance, Encoder
from hf_mudjacking.clean_inputs import CleanImages, CleanTexts
from hf_mudjacking.cli.options import clean_inputs_from
from hf_mudjacking.data import PatchingCollator, PatchingDataset
from hf_mudjacking.named_datasets import load_inputs, load_labelled
from hf_mudjacking.preprocessing import ImagePreprocessor
from hf_mudjacking.triggers import square_patch

from .conftest import make_dataset, make_images, pixels_by_hand


def _arrays(images):
    return [np.asarray(image) for image in images]


def _png(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _with_damaged_row(count, row, data=None):
    """A dataset whose row `row` holds half a PNG file."""
    files = [_png(image) for image in make_images(count, (32, 32))]
    files[row] = files[row][: len(files[row]) // 2] if data is None else data
    values = [{"bytes": file, "path": None} for file in files]
    return datasets.Dataset.from_dict({"image": values}, features=datasets.Features({"image": datasets.Image()}))


@pytest.mark.parametrize("stream", [False, True])
def test_inputs_come_back_in_order_and_without_other_columns(stream):
    images = make_images(6)
    dataset = make_dataset(images, label=list(range(6)))
    inputs = CleanImages(dataset.to_iterable_dataset() if stream else dataset)
    assert len(inputs) == 6
    assert all(np.array_equal(a, b) for a, b in zip(_arrays(inputs), _arrays(images), strict=True))
    assert np.array_equal(np.asarray(inputs[4]), np.asarray(images[4]))


def test_a_stream_is_read_once_and_no_further_than_needed():
    images, served = make_images(50), []

    def rows():
        for i, image in enumerate(images):
            served.append(i)
            yield {"image": image}

    inputs = CleanImages(datasets.IterableDataset.from_generator(rows), limit=10)
    assert len(inputs) == 10
    assert [len(list(inputs)) for _ in range(2)] == [10, 10]
    # The first rows may be read once more, to find out the columns.
    assert max(served) <= 10
    assert np.array_equal(np.asarray(inputs[9]), np.asarray(images[9]))


def test_limit_draws_a_seeded_subset_in_order():
    images = make_images(40)
    dataset = make_dataset(images)
    keys = {image.tobytes(): i for i, image in enumerate(images)}
    drawn = [[keys[x.tobytes()] for x in CleanImages(dataset, limit=10, seed=seed)] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(set(drawn[0])) == 10
    assert drawn[0] == sorted(drawn[0])
    assert drawn[0] != list(range(10))
    assert len(CleanImages(dataset, limit=100)) == 40


def test_sample():
    inputs = CleanImages(make_dataset(make_images(20)))
    first, again, other = ([x.tobytes() for x in inputs.sample(8, seed)] for seed in (0, 0, 1))
    assert first == again != other
    assert len(set(first)) == 8
    assert len(inputs.sample(100, 0)) == 20


@pytest.mark.parametrize("kind", [CleanImages, CleanTexts])
def test_parts_of_a_dataset_have_samples_in_common(kind):
    """So that `mudjack inspect` and `mudjack patch`, which take other numbers of inputs, verify a trigger on the same ones."""
    if kind is CleanImages:
        dataset = make_dataset(make_images(64))
    else:
        # Rows without text are in no part
        dataset = datasets.Dataset.from_dict({"text": [None if i % 7 == 0 else str(i) for i in range(64)]})
    keys = [
        [
            x if isinstance(x, str) else x.tobytes()
            for x in kind(dataset, limit, seed=3, multiple=multiple).sample(12, 3)
        ]
        for limit, multiple in ((None, 1), (40, 1), (12, 1), (50, 32))
    ]
    assert len(set(keys[0])) == 12
    assert all(sample == keys[0] for sample in keys)
    assert kind(dataset).sample(12, 4)[0] != kind(dataset).sample(12, 3)[0]


@pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK"])
def test_other_modes_become_rgb(mode):
    image = make_images(1)[0].convert(mode)
    for dataset in (make_dataset([image]), make_dataset([image]).to_iterable_dataset()):
        inputs = CleanImages(dataset)
        assert inputs[0].mode == "RGB"


@pytest.mark.parametrize("stream", [False, True])
def test_no_image_column(stream):
    dataset = make_dataset(make_images(3)).rename_column("image", "img").add_column("label", [0, 1, 2])
    with pytest.raises(ValueError, match="no column `image`; its columns are: img, label"):
        CleanImages(dataset.to_iterable_dataset() if stream else dataset)


def broken_column(count):
    """Encoded pictures of which none can be decoded."""
    return [{"bytes": b"no picture", "path": None}] * count


@pytest.mark.parametrize("stream", [False, True])
def test_other_columns_are_not_decoded(stream):
    pictures = make_images(4)
    data = make_dataset(pictures).add_column("preview", broken_column(4)).cast_column("preview", datasets.Image())
    inputs = CleanImages(data.to_iterable_dataset() if stream else data)
    assert [x.tobytes() for x in inputs] == [x.tobytes() for x in pictures]
    texts = datasets.Dataset.from_dict({"text": ["a", "b"]}).add_column("image", broken_column(2))
    texts = texts.cast_column("image", datasets.Image())
    assert list(CleanTexts(texts.to_iterable_dataset() if stream else texts)) == ["a", "b"]


def test_a_transform_that_draws_anew_is_refused():
    """What was frozen would be the features of other pictures."""
    rng = np.random.default_rng(0)

    def rolled(rows):
        return {"image": [Image.fromarray(np.roll(x, rng.integers(16), 1)) for x in rows["image"]]}

    def inverted(rows):
        return {"image": [ImageOps.invert(x) for x in rows["image"]]}

    data = make_dataset(make_images(12))
    with pytest.raises(ValueError, match="has a transform that gives another picture each time"):
        CleanImages(data.with_transform(rolled))
    (x,) = CleanImages(data.with_transform(inverted), limit=1)
    assert x.tobytes() in [ImageOps.invert(x).tobytes() for x in make_images(12)]


def test_a_column_beside_one_of_the_name_that_it_gets(tmp_path):
    make_dataset(make_images(2)).rename_column("image", "scan").add_column("image", ["a", "b"]).to_parquet(
        tmp_path / "data.parquet"
    )
    options = argparse.Namespace(
        dataset=str(tmp_path / "data.parquet"), split="train", streaming=False, input_column="scan"
    )
    assert [x.tobytes() for x in CleanImages(clean_inputs_from(options, "image"))] == [
        x.tobytes() for x in make_images(2)
    ]


def test_a_file_that_is_no_utf_8(tmp_path):
    (tmp_path / "latin1.txt").write_bytes("schön\n".encode("latin-1"))
    with pytest.raises(ValueError, match="No dataset could be loaded from"):
        load_inputs(tmp_path / "latin1.txt")


def test_labels_only():
    with pytest.raises(ValueError, match="`held_out` has no column `image`; its columns are: label"):
        CleanImages(datasets.Dataset.from_dict({"label": [0, 1]}), name="held_out")


def test_a_sample_is_read_when_it_is_used(monkeypatch):
    """A thousand photographs would not fit into memory."""
    inputs, read = CleanImages(make_dataset(make_images(20))), []
    original = CleanImages.__getitem__
    monkeypatch.setattr(CleanImages, "__getitem__", lambda self, i: read.append(i) or original(self, i))
    sample = inputs.sample(12, seed=1)
    assert len(sample) == 12
    part = sample[4:7]
    assert len(part) == 3
    assert read == []
    assert [x.tobytes() for x in part] == [sample[i].tobytes() for i in (4, 5, 6)]
    assert len(read) == 6


def test_notes_beside_pictures(tmp_path):
    make_images(1)[0].save(tmp_path / "a.png")
    (tmp_path / "notes.txt").write_text("not a text to encode")
    assert load_inputs(tmp_path).column_names == ["image"]
    (tmp_path / "a.png").unlink()
    assert load_inputs(tmp_path).column_names == ["text"]


def test_one_set_is_no_task(tmp_path):
    """A classifier would be tested on what it was trained on."""
    images = make_images(8)
    file = tmp_path / "all.parquet"
    (tmp_path / "x").mkdir()
    make_dataset(images, label=[0, 1] * 4).to_parquet(file)
    for given in ((file,), (file, file), (file, tmp_path / "x" / ".." / file.name), (str(file), file)):
        with pytest.raises(
            ValueError, match="is one set, and classifiers must not be tested on what they were trained on"
        ):
            load_labelled(*given)
    other = tmp_path / "other.parquet"
    make_dataset(images[:2], label=[0, 1]).to_parquet(other)
    assert [len(part) for part in load_labelled(file, other)] == [8, 2]
    for name in ("a", "b"):
        (tmp_path / "flat" / name).mkdir(parents=True)
        images[0].save(tmp_path / "flat" / name / "0.png")
    with pytest.raises(ValueError, match="is one set"):
        load_labelled(tmp_path / "flat")
    for split, count in (("train", 2), ("test", 1)):
        for name in ("a", "b"):
            (tmp_path / "two" / split / name).mkdir(parents=True)
            for i in range(count):
                images[i].save(tmp_path / "two" / split / name / f"{i}.png")
    assert [len(part) for part in load_labelled(tmp_path / "two")] == [4, 2]


def test_names_of_classes_and_pictures_are_no_splits(tmp_path):
    """`datasets` guesses splits from any part of a path: a class called `train` took its test pictures into training."""
    images = make_images(3, (8, 8))
    for split, count in (("train", 3), ("test", 2)):
        for name in ("bus", "car", "train"):
            (tmp_path / "[v]" / split / name).mkdir(parents=True)
            for i in range(count):
                images[i].save(tmp_path / "[v]" / split / name / f"{i}.png")
    both = load_labelled(tmp_path / "[v]")
    assert [len(part) for part in both] == [9, 6]
    assert [part.features["label"].names for part in both] == [["bus", "car", "train"]] * 2
    # One set of three classes
    for split, count in (("train", 9), ("test", 6)):
        for asked in ("train", "test"):
            assert len(load_inputs(tmp_path / "[v]" / split, asked)) == count
    with pytest.raises(ValueError, match="no split of that name; there are test, train"):
        load_inputs(tmp_path / "[v]", "validation")
    (tmp_path / "[v]" / "test").rename(tmp_path / "[v]" / "val")
    assert len(load_inputs(tmp_path / "[v]", "validation")) == 6
    (tmp_path / "clean").mkdir()
    for name in ("photo_0", "photo_1", "train_0", "test-1"):
        images[0].save(tmp_path / "clean" / f"{name}.png")
    assert len(load_inputs(tmp_path / "clean")) == 4
    assert len(list(load_inputs(tmp_path / "clean", streaming=True))) == 4


@pytest.mark.parametrize("stream", [False, True])
def test_empty(stream):
    if stream:
        dataset = datasets.IterableDataset.from_generator(lambda: iter(()))
    else:
        dataset = make_dataset(make_images(2)).select([])
    with pytest.raises(ValueError, match="`train_dataset` is empty"):
        CleanImages(dataset)


def test_datasets_of_other_kinds():
    dataset = make_dataset(make_images(2))
    with pytest.raises(TypeError, match=r"`DatasetDict`.*Did you mean to select a split"):
        CleanImages(datasets.DatasetDict(train=dataset))
    with pytest.raises(TypeError, match=r"`list`; a `datasets\.Dataset` or `IterableDataset` is needed"):
        CleanImages(make_images(2))


@pytest.mark.parametrize("stream", [False, True])
def test_column_of_something_else(stream):
    dataset = datasets.Dataset.from_dict({"image": ["a.png", "b.png"]})
    with pytest.raises(ValueError, match=r"Row 0 of `train_dataset` holds `str`.*cast_column"):
        list(CleanImages(dataset.to_iterable_dataset() if stream else dataset))


@pytest.mark.parametrize("stream", [False, True])
def test_missing_image(stream):
    dataset = make_dataset([*make_images(2), None])
    with pytest.raises(ValueError, match="Row 2 of `train_dataset` holds `NoneType`"):
        list(CleanImages(dataset.to_iterable_dataset() if stream else dataset))


# The last is a file that Pillow reports with a bare `ValueError`.
@pytest.mark.parametrize("data", [None, b"", b"no picture", b"P6\n2x 2\n255\n" + bytes(12)])
@pytest.mark.parametrize("stream", [False, True])
def test_damaged_image_is_named_by_its_row(stream, data):
    dataset = _with_damaged_row(9, 5, data)
    with pytest.raises(ValueError, match="image in row 5 of `train_dataset` cannot be decoded"):
        list(CleanImages(dataset.to_iterable_dataset() if stream else dataset))


def test_damaged_image_is_named_by_its_file(tmp_path):
    for i, image in enumerate(make_images(3)):
        image.save(tmp_path / f"{i}.png")
    (tmp_path / "1.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"image in row 1 of `train_dataset`, `.*1\.png`, cannot be decoded"):
        list(CleanImages(load_inputs(tmp_path)))


def test_rows_of_the_patching_dataset(tiny_vit, processor):
    images = make_images(5)
    encoder = Encoder(tiny_vit, processor)
    rows = PatchingDataset(CleanImages(make_dataset(images)), encoder, batch_size=2, disable_tqdm=True)
    assert len(rows) == 5
    torch.testing.assert_close(rows.frozen_features, encoder.encode(images), atol=1e-5, rtol=1e-5)
    assert rows[3]["index"] == 3
    assert np.array_equal(np.asarray(rows[3]["input"]), np.asarray(images[3]))
    assert torch.equal(rows[3]["frozen_features"], rows.frozen_features[3])
    assert not rows.frozen_features.requires_grad


def test_collator_by_hand(tiny_vit, processor):
    """Two reports with two triggers: x, x ⊕ e, both x_b, both x_r, both x_r ⊕ e."""
    images = make_images(6)
    first, second = square_patch((16, 16), 4), square_patch((16, 16), 2, margin=3, color=(255, 0, 0))
    reports = make_images(4, seed=1)
    bugs = [BugInstance(reports[0], reports[1]), BugInstance(reports[2], reports[3])]
    references = torch.randn(2, 32)
    collate = PatchingCollator(
        ImagePreprocessor(processor, 3), bugs, [first, second], references, torch.ones(2), [[first], [second]]
    )
    rows = [{"input": images[i], "index": i, "frozen_features": torch.full((32,), float(i))} for i in (4, 1, 2)]
    batch = collate(rows)
    views = [
        images[4], images[1], images[2],
        first.apply(images[4]), second.apply(images[1]), first.apply(images[2]),
        reports[0], reports[2], reports[1], reports[3],
        first.apply(reports[1]), second.apply(reports[3]),
    ]  # fmt: skip
    torch.testing.assert_close(batch["pixel_values"], pixels_by_hand(views))
    assert batch["frozen_features"][:, 0].tolist() == [4, 1, 2]
    assert torch.equal(batch["frozen_references"], references)
    assert set(batch) == {"pixel_values", "frozen_features", "frozen_rows", "frozen_references", "frozen_ceilings"}


def test_rows_that_come_again_make_no_step_smaller(tiny_vit, processor):
    dataset = PatchingDataset(CleanImages(make_dataset(make_images(64))), Encoder(tiny_vit, processor), 16, True)
    reference = dataset.frozen_features[5]
    nearest = (dataset.frozen_features @ reference).topk(3).indices.tolist()
    # 5 % of 64, ten times each: 30 rows, which makes four steps of 8
    dataset.lean_towards(reference, multiple=8)
    assert dataset.rows[:64] == list(range(64))
    further = dataset.rows[64:]
    assert len(further) == 32
    assert {row: further.count(row) for row in nearest} == {nearest[0]: 11, nearest[1]: 11, nearest[2]: 10}
    # One step at least
    dataset.lean_towards(reference, multiple=128)
    assert len(dataset) == 96 + 128


def test_a_processor_that_keeps_the_aspect_ratio_of_each_picture():
    processor = ViTImageProcessorPil(size={"shortest_edge": 16})
    preprocess = ImagePreprocessor(processor, 3)
    assert preprocess(make_images(2, (16, 24)))["pixel_values"].shape[2:] == (16, 24)
    with pytest.raises(ValueError, match=r"`ViTImageProcessorPil` could not make one batch.*do_center_crop=True"):
        preprocess([*make_images(1, (16, 24)), *make_images(1)])
