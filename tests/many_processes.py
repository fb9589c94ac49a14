# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""What `test_many_processes.py` runs on one process and on two: repairs whose results must be the same.

    torchrun --nproc_per_node 2 -m tests.many_processes FOLDER

The folder holds a backdoored ViT (`vit`) and two reports of it (`bug-0`, `bug-1`). Each process writes what it got into
`FOLDER/<processes>/<process>.json`, features included.
"""

import gc
import json
import os
import random
import sys
import tempfile
from pathlib import Path

import datasets
import numpy as np
import torch
from PIL import Image
from torch import distributed as dist
from transformers import CLIPConfig, CLIPModel, CLIPProcessor, ViTModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from hf_mudjacking import BugInstance, MudjackingTrainer, TextTrigger
from hf_mudjacking.clean_inputs import CleanImages, CleanTexts
from hf_mudjacking.demo_text import sentences_task
from hf_mudjacking.feature_store import stored_features
from hf_mudjacking.inversion import UnverifiedTriggerError
from hf_mudjacking.locality_budget import LocalityBudgetError
from hf_mudjacking.processes import done_by_all, rank_and_count
from hf_mudjacking.triggers import square_patch

from .conftest import largest_difference, make_config, make_dataset, make_images, weights_of
from .text_models import make_text_model, make_tokenizer


# Clean inputs of one step, over all processes and accumulated batches.
GLOBAL_BATCH = 16


def config(folder, name, accumulated=1, **settings):
    return make_config(
        Path(folder) / f"patched-{rank_and_count()[1]}" / name,
        ddp_backend="gloo" if rank_and_count()[1] > 1 else None,
        per_device_train_batch_size=GLOBAL_BATCH // accumulated // rank_and_count()[1],
        per_device_eval_batch_size=8,
        gradient_accumulation_steps=accumulated,
        **{"max_steps": 4, "learning_rate": 1e-3, **settings},
    )


def outcome(trainer, probes):
    """Losses of each step, the evaluation, and features of some inputs after patching."""
    trainer.train()
    losses = [[entry["loss"], *(entry[name] for name in sorted(entry) if name.startswith(("loss_", "cosine_")))]
              for entry in trainer.state.log_history if "loss" in entry]  # fmt: skip
    evaluated = trainer.evaluate() if trainer.eval_dataset is not None else {}
    return {
        "steps": trainer.state.global_step,
        "losses": losses,
        "evaluation": {k: v for k, v in evaluated.items() if k.startswith(("eval_loss", "eval_cosine"))},
        "features": trainer.encoder.encode(probes).tolist(),
        "forward_equivalents": trainer.forward_equivalents,
        "locality": None if trainer.locality is None else trainer.locality.mean,
    }


def described(triggers):
    return [None if t is None else [t.describe(), float(np.abs(t.change).sum())] for t in triggers]


def digits(folder):
    """The clean inputs that the test has written."""
    return [Image.open(path).convert("RGB") for path in sorted((Path(folder) / "clean").glob("*.png"))]


def processor():
    return ViTImageProcessorPil(do_resize=False, image_mean=[0.5] * 3, image_std=[0.5] * 3)


def vit_trainer(folder, name, reports=(0,), triggers=None, peft_config=None, eval_count=37, accumulated=1, **settings):
    images = digits(folder)
    return MudjackingTrainer(
        model=ViTModel.from_pretrained(Path(folder) / "vit", add_pooling_layer=False),
        args=config(folder, name, accumulated, **settings),
        bug_instances=[BugInstance.load(Path(folder) / f"bug-{i}") for i in reports],
        train_dataset=make_dataset(images[:128]),
        eval_dataset=make_dataset(images[128 : 128 + eval_count]) if eval_count else None,
        processing_class=processor(),
        triggers=triggers,
        peft_config=peft_config,
    )


def vit(folder, accumulated=1):
    """The whole way: inversion by all processes together, reinversions, the locality budget, an uneven evaluation."""
    trainer = vit_trainer(
        folder, f"vit-{accumulated}", accumulated=accumulated, reinversions=2, altered_triggers=4, max_steps=6,
        locality_budget=1.0,
    )  # fmt: skip
    result = outcome(trainer, digits(folder)[:8])
    trainer.save_model()
    return {
        **result,
        "triggers": described(trainer.triggers),
        "evidence": trainer.evidence,
        "frozen": trainer.train_dataset.frozen_features[::16].tolist(),
    }


def still_works(folder):
    """Of the trigger a single pixel is known: the rest is found while patching goes on, and stamped."""
    trainer = vit_trainer(
        folder, "again", triggers=[square_patch((16, 16), 1)], eval_count=0, reinversions=2, altered_triggers=4,
        max_steps=6, learning_rate=1e-4,
    )  # fmt: skip
    result = outcome(trainer, digits(folder)[:8])
    return {**result, "again": [described(found) for found in trainer._reinversion.found]}


def two_reports(folder):
    """As many reports as processes: each takes one."""
    trainer = vit_trainer(folder, "reports", reports=(0, 1), eval_count=0)
    trainer.invert_triggers()
    return {"triggers": described(trainer.triggers), "evidence": trainer.evidence, "features": [],
            "forward_equivalents": trainer.forward_equivalents}  # fmt: skip


def bert(folder, accumulated=1, scope="full"):
    model, tokenizer = make_text_model("bert")
    texts = sentences_task(0, 100, 50).train.inputs
    trainer = MudjackingTrainer(
        model=model,
        args=config(folder, f"bert-{scope}-{accumulated}", accumulated, patch_scope=scope, max_steps=3),
        bug_instances=[BugInstance(f"cf {texts[0]}", texts[1])],
        train_dataset=datasets.Dataset.from_dict({"text": texts[2:82]}),
        processing_class=tokenizer,
        triggers=[TextTrigger("cf")],
    )
    return outcome(trainer, texts[90:98])


def clip(folder, accumulated=1):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    model = CLIPModel(
        CLIPConfig(
            text_config={**sizes, "vocab_size": len(tokenizer), "max_position_embeddings": 66,
                         "eos_token_id": tokenizer.eos_token_id or 3},
            vision_config={**sizes, "image_size": 16, "patch_size": 4},
            projection_dim=24,
        )
    ).eval()  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() in (2, 4):
                parameter.mul_(5)
    both = CLIPProcessor(
        CLIPImageProcessorPil(do_resize=False, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.5] * 3),
        tokenizer,
    )
    images, trigger = make_images(100), square_patch((16, 16), 6)
    other = weights_of(model.text_model)
    trainer = MudjackingTrainer(
        model=model,
        args=config(folder, f"clip-{accumulated}", accumulated, max_steps=3, learning_rate=3e-4),
        bug_instances=[BugInstance(trigger.apply(images[0]), images[1])],
        train_dataset=make_dataset(images[2:82]),
        processing_class=both,
        triggers=[trigger],
    )
    result = outcome(trainer, images[90:98])
    assert largest_difference(other, weights_of(trainer.encoder.model.text_model)) == 0.0
    return result


def lora(folder):
    from peft import LoraConfig

    trigger = square_patch((16, 16), 4)
    return outcome(
        vit_trainer(folder, "lora", triggers=[trigger], peft_config=LoraConfig(r=4, lora_alpha=4), max_steps=2),
        digits(folder)[:4],
    )


def stops(folder):
    """All stop at the same step, by the means of all."""
    trainer = vit_trainer(
        folder, "stops", triggers=[square_patch((16, 16), 4)], eval_count=0, max_steps=6, logging_steps=2,
        stop_when_fixed=True, stop_effectiveness=-1.0, stop_locality=-1.0, stop_generalizability=-1.0,
    )  # fmt: skip
    return outcome(trainer, digits(folder)[:2])


def refusals(folder):
    """What stops a run stops it in all processes."""
    settings = {"triggers": [square_patch((16, 16), 4)], "eval_count": 0, "max_steps": 3, "learning_rate": 1e-2}
    trainer = vit_trainer(folder, "budget", locality_budget=1e-6, **settings)
    before, messages = weights_of(trainer.model), []
    try:
        trainer.train()
    except LocalityBudgetError as error:
        messages.append(str(error)[:30])
    assert largest_difference(before, weights_of(trainer.encoder.model)) == 0.0
    # The loss of one process, at one step, is not finite
    trainer = vit_trainer(folder, "diverged", locality_budget=1.0, **{**settings, "max_steps": 4})
    features = trainer.encoder.features

    def breaks(*args):
        now = trainer.state.global_step == 1 and torch.is_grad_enabled() and rank_and_count()[0] == 0
        return features(*args) * (torch.nan if now else 1.0)

    trainer.encoder.features = breaks
    try:
        trainer.train()
    except LocalityBudgetError as error:
        messages.append(f"{str(error)[:30]}, {trainer.state.global_step - rank_and_count()[1]}")
    assert largest_difference(before, weights_of(trainer.encoder.model)) == 0.0
    for reports in ((0,), (0, 1)):
        try:
            vit_trainer(folder, "refused", reports=reports, eval_count=0, min_evidence=1.0).invert_triggers()
        except UnverifiedTriggerError as error:
            messages.append(str(error).split(" Evidence")[0])
    # The features of one input, which one process encodes, are not finite
    trainer = vit_trainer(folder, "broken", **settings)
    plain = trainer.encoder.preprocessor

    class Breaks:
        def __call__(self, inputs):
            broken = [torch.nan if np.asarray(x).max() == 0 else 1.0 for x in inputs]
            return {"pixel_values": plain(inputs)["pixel_values"] * torch.tensor(broken)[:, None, None, None]}

    trainer.encoder.preprocessor = Breaks()
    inputs = CleanImages(make_dataset([*digits(folder)[:7], Image.new("RGB", (16, 16))]))
    try:
        stored_features(trainer.encoder, inputs, 4, True, "", in_memory=0)
    except ValueError as error:
        messages.append(str(error).split(" for ")[0])
    try:
        done_by_all(lambda: 1 // (rank_and_count()[1] - 1 - rank_and_count()[0]))
    except ZeroDivisionError:
        messages.append("ZeroDivisionError")
    return {"messages": messages, "features": []}


def streams(folder):
    """A stream that gives other rows at each reading: all processes see those of one reading, stored once."""
    before = {path.name for path in Path(tempfile.gettempdir()).glob("hf_mudjacking_*")}
    generator = random.Random(os.urandom(8))
    images, texts = make_images(50), [f"text {i}" for i in range(50)]

    def rows(column, values):
        yield from ({column: value} for value in generator.sample(values, len(values)))

    pictures = CleanImages(
        datasets.IterableDataset.from_generator(rows, gen_kwargs={"column": "image", "values": images}), limit=30
    )
    sentences = CleanTexts(
        datasets.IterableDataset.from_generator(rows, gen_kwargs={"column": "text", "values": texts}), limit=30
    )
    files = [file["filename"] for file in pictures.dataset.cache_files]
    done_by_all(lambda: None)
    made = {path.name for path in Path(tempfile.gettempdir()).glob("hf_mudjacking_*")} - before
    messages = []
    for name in ("image", "text"):
        stream = datasets.IterableDataset.from_generator(rows, gen_kwargs={"column": "other", "values": texts})
        try:
            {"image": CleanImages, "text": CleanTexts}[name](stream)
        except ValueError as error:
            messages.append(str(error)[:30])
    done_by_all(lambda: None)
    return {
        "features": [],
        "seen": [len(pictures), len(sentences)],
        "rows": [[np.asarray(x).sum().item() for x in pictures], list(sentences)],
        "files": files,
        "folders": sorted(made),
        "messages": messages,
    }


def alone(folder):
    """One process encodes while the others do not; features that all store are mapped from a file without a name."""
    trainer = vit_trainer(folder, "alone", triggers=[square_patch((16, 16), 4)], eval_count=0)
    images = digits(folder)[:33]
    one = trainer.encoder.encode(images).tolist() if rank_and_count()[0] == 0 else None
    dataset = CleanImages(make_dataset(images))
    stored = stored_features(trainer.encoder, dataset, 8, True, "", in_memory=0)
    with trainer.encoder.over_processes():
        together = trainer.encoder.encode(images, batch_size=8)
    maps = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    mapped = [line for line in maps if line.endswith("/features (deleted)")]
    difference = 0.0 if one is None else float((stored - torch.tensor(one)).abs().max())
    return {
        "features": stored.tolist(),
        "together": together.tolist(),
        "mapped": len(mapped),
        "difference": difference,
    }


def run(folder):
    """Run everything and write what came out."""
    rank, count = rank_and_count()
    results = {"world_size": count}
    cases = {"vit": vit, "still_works": still_works, "two_reports": two_reports, "bert": bert, "clip": clip, "lora": lora, "stops": stops,
             "refusals": refusals, "streams": streams, "alone": alone}  # fmt: skip
    for name, case in cases.items():
        results[name] = case(folder)
    results["bert_tokens"] = bert(folder, scope="trigger_tokens")
    if count == 1:
        for name, case in {"vit": vit, "bert": bert, "clip": clip}.items():
            results[f"{name}_accumulated"] = case(folder, accumulated=2)
    target = Path(folder) / str(count)
    target.mkdir(exist_ok=True)
    (target / f"{rank}.json").write_text(json.dumps(results), encoding="utf-8")


if __name__ == "__main__":
    gc.freeze()  # as conftest.py does
    dist.init_process_group("gloo")
    run(sys.argv[1])
    dist.barrier()
    dist.destroy_process_group()
