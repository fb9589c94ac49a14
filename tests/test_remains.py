# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""What is left of a bug after a repair, computed by hand."""

import logging

import pytest
import torch

from hf_mudjacking import BugInstance, Encoder, MudjackingTrainer, PatchTrigger, TextTrigger
from hf_mudjacking.remains import remains

from .conftest import make_config, make_images


def test_by_hand(tiny_vit, processor, dataset, bug, trigger, tmp_path):
    trainer = MudjackingTrainer(
        tiny_vit, make_config(tmp_path, max_steps=3, learning_rate=1e-2, locality_budget=None), [bug], dataset,
        processing_class=processor, triggers=[trigger],
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"Call `trainer.train\(\)` first"):
        trainer.what_is_left()
    (led_to,) = Encoder(tiny_vit, processor).encode([bug.misclassified])
    trainer.train()
    (left,) = trainer.what_is_left()
    x_b, x_r = trainer.encoder.encode([bug.misclassified, bug.reference])
    cosine, before = float(x_b @ x_r), float(led_to @ x_r)
    assert left.cosine == pytest.approx(cosine, abs=1e-6)
    assert left.came == pytest.approx((cosine - before) / (1 - before), abs=1e-5)
    inputs = list(trainer._sample(32))
    clean, stamped = (trainer.encoder.encode(part) @ led_to for part in (inputs, [trigger.apply(x) for x in inputs]))
    assert left.transfer == pytest.approx(float((stamped - clean).sum() / (1 - clean).sum()), abs=1e-5)
    assert f"{left.transfer:.2f} of the way" in left.describe()


class _Meter:
    """x_b was at a cosine of 0.5 with x_r and is at another one now; no trigger carries anything."""

    def __init__(self, now):
        self.now = now
        self.target = torch.tensor([0.5, 0.75**0.5])

    def features(self, inputs):
        return torch.tensor([[self.now, (1 - self.now**2) ** 0.5], [1.0, 0.0]])


@pytest.mark.parametrize(
    ("ceiling", "now", "repaired"),
    [(1.0, 0.5, False), (1.0, 0.74, False), (1.0, 0.76, True), (0.6, 0.5, False), (0.6, 0.6, True),
     # Without its trigger x_b is no nearer to x_r than with it: it is as near as it comes
     (0.45, 0.45, True), (0.5, 0.5, True), (0.45, 0.2, False)],
)  # fmt: skip
def test_how_near_it_comes(ceiling, now, repaired):
    left = remains(_Meter(now), BugInstance(*make_images(2)), None, ceiling)
    assert left.repaired == repaired
    assert abs(left.came) < 20


def test_nothing_trained_is_no_patch(tiny_vit, processor, dataset, bug, trigger, tmp_path, caplog):
    trainer = MudjackingTrainer(
        tiny_vit, make_config(tmp_path), [bug], dataset, processing_class=processor, triggers=[trigger]
    )
    with caplog.at_level(logging.WARNING):
        trainer.save_model()
    assert "Nothing has been trained yet" in caplog.text


def test_a_trigger_says_what_it_is():
    assert repr(TextTrigger("cf")) == "<TextTrigger: text, 1 word anywhere>"
    mask = [[True, False], [False, False]]
    assert repr(PatchTrigger.from_image(make_images(1, (2, 2))[0], mask)).startswith("<PatchTrigger: patch, 25.0%")
    assert "PIL" in repr(BugInstance(*make_images(2)))
