# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
import copy

import datasets
import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from sklearn.linear_model import LogisticRegression

from hf_mudjacking.evaluation.classifiers import MLPClassifier, train_classifier
from hf_mudjacking.evaluation.metrics import AttackSuccessRate, CleanAccuracy, RobustAccuracy
from hf_mudjacking.evaluation.pretraining import _random_crop, pretrain_encoder
from hf_mudjacking.evaluation.tasks import DownstreamTask, LabelledInputs

from .conftest import make_dataset, make_images


# Target 9. Rows: hit, hit, right, miss, target class predicted as target, target class predicted as 1.
PREDICTIONS, TRUTH = [9, 9, 3, 5, 9, 1], [1, 2, 3, 4, 9, 9]


def test_attack_success_rate_without_the_target_class():
    assert AttackSuccessRate().compute(predictions=PREDICTIONS, references=TRUTH, target=9) == {
        "attack_success_rate": 2 / 4
    }


def test_attack_success_rate_with_the_target_class():
    rates = AttackSuccessRate().compute(predictions=PREDICTIONS, references=TRUTH, target=9, include_target_class=True)
    assert rates == {"attack_success_rate": 3 / 6}


def test_robust_accuracy():
    assert RobustAccuracy().compute(predictions=PREDICTIONS, references=TRUTH) == {"robust_accuracy": 2 / 6}
    rate = RobustAccuracy().compute(predictions=PREDICTIONS, references=TRUTH, target=9)
    assert rate == {"robust_accuracy": 1 / 4}


def test_clean_accuracy():
    assert CleanAccuracy().compute(predictions=PREDICTIONS, references=TRUTH) == {"clean_accuracy": 2 / 6}


def test_target_zero_is_a_class_like_any_other():
    predictions, truth = [0, 0, 2], [0, 1, 2]
    asr = AttackSuccessRate().compute(predictions=predictions, references=truth, target=0)
    assert asr == {"attack_success_rate": 0.5}
    ra = RobustAccuracy().compute(predictions=predictions, references=truth, target=0)
    assert ra == {"robust_accuracy": 0.5}


def test_a_target_is_a_number():
    """A target of another type is in no prediction: an attack that always succeeds would have a rate of 0."""
    for target in (None, "9", 9.0):
        with pytest.raises(TypeError):
            AttackSuccessRate().compute(predictions=[9, 9], references=[1, 2], target=target)
    with pytest.raises(TypeError):
        RobustAccuracy().compute(predictions=[9, 9], references=[1, 2], target="9")
    assert AttackSuccessRate().compute(predictions=[9], references=[1], target=np.int64(9))["attack_success_rate"] == 1


def test_nothing_to_measure_on():
    with pytest.raises(ValueError, match="There is no prediction to measure the clean accuracy on"):
        CleanAccuracy().compute(predictions=[], references=[])


def test_arrays_and_batches():
    metric = AttackSuccessRate()
    metric.add_batch(predictions=np.array(PREDICTIONS[:3]), references=np.array(TRUTH[:3]))
    metric.add_batch(predictions=np.array(PREDICTIONS[3:]), references=np.array(TRUTH[3:]))
    assert metric.compute(target=9) == {"attack_success_rate": 0.5}
    assert metric.compute(predictions=[9], references=[1], target=9) == {"attack_success_rate": 1.0}


@pytest.mark.parametrize("metric", [AttackSuccessRate, RobustAccuracy])
def test_nothing_but_the_target_class(metric):
    with pytest.raises(ValueError, match=r"No input is left .* of the target class 9"):
        metric().compute(predictions=[9, 9], references=[9, 9], target=9)


def test_metrics_write_no_files(tmp_path):
    metric = CleanAccuracy(cache_dir=str(tmp_path))
    assert metric.compute(predictions=PREDICTIONS, references=TRUTH) == {"clean_accuracy": 2 / 6}
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


# ---- Classifiers ----


def _blobs(labels=(3, 7, 11)):
    rng = np.random.default_rng(0)
    centers = np.eye(3, 8)
    y = rng.integers(0, 3, 150)
    x = centers[y] + 0.1 * rng.normal(size=(150, 8))
    return torch.from_numpy(x).float(), np.array(labels)[y]


@pytest.mark.parametrize("kind", ["logistic", "mlp"])
def test_classifiers_learn_and_keep_the_labels(kind):
    x, y = _blobs()
    classifier = train_classifier(x, y, kind)
    assert (classifier.predict(x.numpy()) == y).mean() == 1.0
    assert set(classifier.predict(x.numpy())) == {3, 7, 11}


def test_logistic_regression_is_the_default_with_c_10():
    classifier = train_classifier(*_blobs())
    assert isinstance(classifier, LogisticRegression)
    assert classifier.C == 10.0


def test_unknown_classifier():
    with pytest.raises(ValueError, match="Classifier 'forest' is unknown"):
        train_classifier(*_blobs(), "forest")


def test_the_mlp_is_the_papers():
    x, y = _blobs()
    network = MLPClassifier(epochs=1).fit(x.numpy(), y).network
    shapes = [tuple(layer.weight.shape) for layer in network if isinstance(layer, torch.nn.Linear)]
    assert shapes == [(512, 8), (256, 512), (3, 256)]
    assert [layer.p for layer in network if isinstance(layer, torch.nn.Dropout)] == [0.5]


def test_the_mlp_is_deterministic_and_leaves_the_random_state():
    x, y = _blobs()
    torch.manual_seed(1)
    first = MLPClassifier(epochs=3, seed=5).fit(x.numpy(), y)
    after = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), after), "fit must not move the global random state"
    torch.manual_seed(77)
    again = MLPClassifier(epochs=3, seed=5).fit(x.numpy(), y)
    other = MLPClassifier(epochs=3, seed=6).fit(x.numpy(), y)
    for a, b in zip(first.network.parameters(), again.network.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(first.network[0].weight, other.network[0].weight)
    assert np.array_equal(again.predict(x.numpy()), again.predict(x.numpy())), "dropout must be off"


# ---- Labelled inputs ----


def test_labelled_inputs_from_a_dataset():
    images = make_images(4)
    dataset = make_dataset([images[0].convert("L"), *images[1:]], label=[2, 0, 2, 1])
    data = LabelledInputs.from_dataset(dataset)
    assert data.labels.tolist() == [2, 0, 2, 1]
    assert {x.mode for x in data.inputs} == {"RGB"}
    chosen = data.select([3, 1])
    assert chosen.labels.tolist() == [1, 0]
    assert np.array_equal(np.asarray(chosen.inputs[0]), np.asarray(images[3]))
    assert len(chosen) == 2


def test_labelled_inputs_refuse():
    dataset = make_dataset(make_images(2), label=[0, 1])
    with pytest.raises(ValueError, match=r"missing: \['fine_label'\], found: \['image', 'label'\]"):
        LabelledInputs.from_dataset(dataset, label_column="fine_label")
    with pytest.raises(ValueError, match="There are 2 inputs and 3 labels"):
        LabelledInputs(make_images(2), [0, 1, 1])
    with pytest.raises(ValueError, match="at least two classes"):
        LabelledInputs(make_images(2), [1, 1])


def test_labels_that_are_none():
    images = make_images(6)
    for labels in ([0, 1, 2, -1, -1, -1], [0, 1, -1, 0, 1, 0]):
        with pytest.raises(ValueError, match="rows of the labelled set have a negative number"):
            LabelledInputs.from_dataset(make_dataset(images, label=labels))
    assert LabelledInputs.from_dataset(make_dataset(images, label=[-1, 1] * 3)).labels.tolist() == [-1, 1] * 3


def test_rows_without_a_label_are_counted():
    with pytest.raises(
        ValueError, match=r"2 rows of the labelled set have no label in the column `label` \(the first is row 1\)"
    ):
        LabelledInputs.from_dataset(make_dataset(make_images(4), label=[0, None, None, 1]))


def test_what_is_no_labelled_set():
    dataset = make_dataset(make_images(4), label=[0, 1, 0, 1])
    both = datasets.DatasetDict(train=dataset, test=dataset)
    for read in (LabelledInputs.from_dataset, lambda given: DownstreamTask.from_datasets(given, given)):
        with pytest.raises(TypeError, match=r"`DatasetDict`.* Select a split: `dataset\['train'\]`"):
            read(both)
        with pytest.raises(TypeError, match=r"`IterableDataset`; a `datasets.Dataset` is needed\. Read it into one"):
            read(dataset.to_iterable_dataset())
        with pytest.raises(TypeError, match=r"`list`; a `datasets.Dataset` is needed\.$"):
            read([1, 2])


def test_a_format_of_a_labelled_set_is_set_aside():
    """Of `numpy` with a column, the pictures are not among what is given; a transform is what the user wants."""
    images = make_images(4)
    dataset = make_dataset(images, label=[0, 1, 0, 1])
    for formatted in (dataset.with_format("numpy"), dataset.with_format("torch", columns=["label"])):
        data = LabelledInputs.from_dataset(formatted)
        assert [x.tobytes() for x in data.inputs] == [x.tobytes() for x in images]
        assert data.labels.tolist() == [0, 1, 0, 1]
    mirrored = dataset.with_transform(lambda rows: {**rows, "image": [ImageOps.mirror(x) for x in rows["image"]]})
    found = LabelledInputs.from_dataset(mirrored).inputs
    assert [x.tobytes() for x in found] == [ImageOps.mirror(x).tobytes() for x in images]


def test_classes_that_no_training_row_has(caplog):
    train, test = (
        make_dataset(make_images(6, seed=i), label=labels) for i, labels in ((0, [0, 1] * 3), (1, [0, 2] * 3))
    )
    DownstreamTask.from_datasets(train, test)
    assert "3 of 6 test rows of `task` are of classes of which its training set has none (2)" in caplog.text


def test_classes_are_paired_by_name():
    """Folders of pictures number the classes that are there: without `b`, `c` is 1."""
    image = Image.new("RGB", (4, 4))

    def part(names, labels):
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
        return datasets.Dataset.from_dict({"image": [image] * len(labels), "label": labels}, features=features)

    train = part(["a", "b", "c"], [0, 1, 2])
    task = DownstreamTask.from_datasets(train, part(["a", "c"], [1, 0, 1]))
    assert task.test.labels.tolist() == [2, 0, 2]
    assert task.class_names == ["a", "b", "c"]
    with pytest.raises(ValueError, match="has classes that its training set lacks: d"):
        DownstreamTask.from_datasets(train, part(["a", "d"], [0, 1]))


def test_labelled_pictures_of_16_bits_are_not_clipped():
    ramp = Image.fromarray(np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16))
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    data = datasets.Dataset.from_dict({"image": [ramp, ramp], "label": [0, 1]}, features=features)
    assert 120 < np.asarray(LabelledInputs.from_dataset(data).inputs[0]).mean() < 135


def test_a_damaged_labelled_picture_is_named_by_its_row(tmp_path):
    make_images(1, size=(64, 64))[0].save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:3000])
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    files = [str(tmp_path / f"{name}.png") for name in ("whole", "cut")]
    data = datasets.Dataset.from_dict({"image": files, "label": [0, 1]}, features=features)
    with pytest.raises(ValueError, match=r"image in row 1 of the labelled set cannot be decoded .* Remove that row"):
        LabelledInputs.from_dataset(data)


def test_task_takes_the_class_names():
    names = datasets.ClassLabel(names=["cat", "dog"])
    dataset = make_dataset(make_images(2), y=[0, 1]).cast_column("y", names)
    task = DownstreamTask.from_datasets(dataset, dataset, name="pets", label_column="y")
    assert (task.name, task.class_names) == ("pets", ["cat", "dog"])
    assert DownstreamTask.from_datasets(dataset.cast_column("y", datasets.Value("int64")), dataset, label_column="y")


# ---- Pretraining ----


def test_pretraining_is_deterministic_and_learns(tiny_vit, processor):
    images = make_images(12)
    data = LabelledInputs(images, [i % 3 for i in range(12)])
    weights = []
    for seed, state in ((0, 5), (0, 6), (1, 6)):
        model = copy.deepcopy(tiny_vit)
        # The ViT has dropout, which draws from the global random state
        torch.manual_seed(state)
        pretrain_encoder(
            model, processor, data, epochs=2, batch_size=4, crop_padding=1, horizontal_flip=True, seed=seed,
            disable_tqdm=True,
        )  # fmt: skip
        assert not model.training
        assert torch.initial_seed() == state
        weights.append(model.layers[0].attention.q_proj.weight.detach())
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert not torch.equal(weights[0], tiny_vit.layers[0].attention.q_proj.weight)
    with pytest.raises(ValueError, match="There are 12 training inputs, and a batch takes 128; lower `batch_size`"):
        pretrain_encoder(tiny_vit, processor, data, epochs=1)


def test_random_crops_by_hand():
    x = torch.arange(2 * 3 * 4 * 4, dtype=torch.float32).reshape(2, 3, 4, 4) + 1
    generator = torch.Generator().manual_seed(3)
    top, left = torch.randint(0, 3, (2, 2, 1), generator=torch.Generator().manual_seed(3))
    cropped = _random_crop(x, 1, generator)
    padded = torch.nn.functional.pad(x, (1, 1, 1, 1))
    for i in range(2):
        expected = padded[i, :, top[i, 0] : top[i, 0] + 4, left[i, 0] : left[i, 0] + 4]
        assert torch.equal(cropped[i], expected)


def test_the_fixture_was_learnt(backdoored):
    assert backdoored.implant.clean_accuracy >= 0.95
    rates = backdoored.rates(backdoored.model(), backdoored.kept)
    assert rates["BA"] >= 0.95
