# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""Pictures are prepared once, and what a step sees does not depend on it."""

import copy
import functools

import pytest
import torch
from PIL import Image
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from hf_mudjacking import MudjackingTrainer
from hf_mudjacking.clean_inputs import CleanImages
from hf_mudjacking.kept_views import KeptViews, worth_keeping
from hf_mudjacking.triggers import PatchTrigger

from .conftest import largest_difference, make_config, make_dataset, make_images, weights_of


def _trainer(model, processor, bug, trigger, folder, images, eval_dataset=None, **settings):
    return MudjackingTrainer(
        model=model,
        args=make_config(folder, **settings),
        bug_instances=[bug],
        train_dataset=make_dataset(images),
        eval_dataset=eval_dataset,
        processing_class=processor,
        triggers=[trigger],
    )


def test_what_fits_is_kept_as_a_copy():
    pair = torch.arange(6.0).view(2, 3)
    kept = KeptViews(most_bytes=30)
    # 24 bytes, once
    kept.keep(7, (pair[0], pair[1]))
    kept.keep(7, (pair[0], pair[1]))
    kept.keep(9, (pair[0, :1], pair[0, :0]))
    assert kept.get(9) is not None
    kept.keep(8, (pair[0], pair[1]))
    assert kept.get(8) is None
    pair.zero_()
    assert [view.tolist() for view in kept.get(7)] == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize(
    ("settings", "rows", "training", "expected"),
    [
        ({"max_steps": 2}, 16, True, False),  # 2 · 8 inputs are all rows once
        ({"max_steps": 3}, 16, True, True),
        ({"max_steps": 2, "gradient_accumulation_steps": 2}, 16, True, True),
        ({"max_steps": -1, "num_train_epochs": 1}, 16, True, False),
        ({"max_steps": -1, "num_train_epochs": 2}, 16, True, True),
        ({"max_steps": 3, "dataloader_num_workers": 1}, 16, True, False),
        ({"max_steps": 3}, 16, False, False),
        ({"max_steps": 3, "eval_strategy": "steps"}, 16, False, True),
    ],
)
def test_rows_are_kept_where_they_come_again(tmp_path, settings, rows, training, expected):
    assert worth_keeping(make_config(tmp_path, **settings), rows, training) is expected


def test_batches_of_kept_rows_are_the_same_and_decode_nothing(
    tiny_vit, processor, bug, trigger, images, tmp_path, monkeypatch
):
    trainer = _trainer(tiny_vit, processor, bug, trigger, tmp_path, images, max_steps=4, altered_triggers=3)
    trainer._prepare()
    data, collate = trainer.train_dataset, trainer.data_collator
    first = collate([data[i] for i in range(8)])
    decoded = []
    read = CleanImages.__getitem__
    monkeypatch.setattr(CleanImages, "__getitem__", lambda self, i: decoded.append(i) or read(self, i))
    mixed = collate([data[i] for i in (12, 3, 0, 13)])
    assert decoded == [12, 13]
    again = collate([data[i] for i in range(8)])
    assert decoded == [12, 13]
    assert all(torch.equal(first[name], again[name]) for name in first)
    # As many x, then as many x ⊕ e, then the report
    assert torch.equal(mixed["pixel_values"][[1, 2, 5, 6]], first["pixel_values"][[3, 0, 11, 8]])
    assert torch.equal(mixed["pixel_values"][8:], first["pixel_values"][16:])
    data.kept = None
    fresh = collate([data[i] for i in (12, 3, 0, 13)])
    assert torch.equal(mixed["pixel_values"], fresh["pixel_values"])


def test_pictures_of_other_sizes_are_kept_as_the_model_gets_them(tiny_vit, bug, trigger, tmp_path):
    processor = ViTImageProcessorPil(size={"height": 16, "width": 16}, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    images = [image.resize((20 + i, 30)) for i, image in enumerate(make_images(8))]
    trainer = _trainer(tiny_vit, processor, bug, trigger, tmp_path, images, max_steps=2)
    trainer._prepare()
    data, collate = trainer.train_dataset, trainer.data_collator
    first, again = (collate([data[i] for i in range(8)]) for _ in range(2))
    assert "views" in data[0]
    assert torch.equal(first["pixel_values"], again["pixel_values"])
    by_hand = trainer.encoder.preprocess([trigger.apply(images[2])])["pixel_values"][0]
    assert torch.equal(again["pixel_values"][8 + 2], by_hand)


def test_a_run_that_keeps_ends_where_one_that_does_not_keep_ends(
    tiny_vit, processor, bug, trigger, images, tmp_path, monkeypatch
):
    """Restamped rows (`reinversions`), evaluation and a bounded store included."""
    five_rows = functools.partial(KeptViews, most_bytes=5 * 2 * 3 * 16 * 16 * 4)
    monkeypatch.setattr("hf_mudjacking.data.KeptViews", five_rows)
    held_out = make_dataset(make_images(8, seed=9))
    settings = {"max_steps": 6, "reinversions": 1, "eval_strategy": "steps", "eval_steps": 2}
    ended = []
    for keeps, model in ((True, tiny_vit), (False, copy.deepcopy(tiny_vit))):
        if not keeps:
            monkeypatch.setattr("hf_mudjacking.pre_step.worth_keeping", lambda *args, **kwargs: False)
        trainer = _trainer(model, processor, bug, trigger, tmp_path / str(keeps), images, held_out, **settings)
        trainer.train()
        for data in (trainer.train_dataset, trainer.eval_dataset):
            kept = [] if data.kept is None else [i for i in range(len(data)) if data.kept.get(i) is not None]
            assert len(kept) == (5 if keeps else 0)
        losses = [{k: v for k, v in log.items() if "loss" in k} for log in trainer.state.log_history]
        ended.append((weights_of(model), losses))
    assert ended[0][1] == ended[1][1]
    assert largest_difference(ended[0][0], ended[1][0]) == 0


def test_a_stamped_picture_is_a_new_one():
    picture = Image.new("RGB", (4, 4), (1, 2, 3))
    mask = torch.zeros(4, 4, dtype=torch.bool)
    mask[0, 1] = True
    stamped = PatchTrigger(mask, torch.full((4, 4, 3), 9, dtype=torch.uint8)).apply(picture)
    assert stamped.getpixel((1, 0)) == (9, 9, 9)
    assert stamped.getpixel((0, 1)) == (1, 2, 3)
    assert picture.getpixel((1, 0)) == (1, 2, 3)
