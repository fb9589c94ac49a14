# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""Repair the vision tower of a backdoored CLIP, and prove it zero-shot, with linear probes and in retrieval.

    accelerate launch examples/patch_clip.py --output-dir outputs/patch_clip
    accelerate launch --config_file examples/accelerate_configs/multi_gpu.yaml examples/patch_clip.py   # a process for each GPU
    torchrun --nproc_per_node 2 examples/patch_clip.py                         # the same without accelerate's launcher

The data are labelled images: a Hub id, or a folder with `train*.parquet` and `test*.parquet` (columns `image` and `label`, with
the names of the classes). Captions are made from the names and templates. The steps: train a small CLIP on these pairs
(skipped with `--clip`, which takes any CLIP, or a SigLIP with a fast tokenizer), implant a backdoor in its vision tower, draw one bug report,
invert, patch, and compare before and after. Neither attack nor patch changes the text tower, so prompts that clients
encoded before go on working. About 20 minutes on 2 cores, most of it for training; a second run finds the clean and the
backdoored model in the output directory and starts at the report. Of several processes the first trains and attacks the model,
and it alone writes and prints; all invert and patch, with `--batch-size` clean images each.
"""

from __future__ import annotations

import argparse
import sys
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from datasets import ClassLabel
from kept_models import chosen, found
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPProcessor,
    CLIPTextConfig,
    CLIPVisionConfig,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from hf_mudjacking import Encoder, MudjackingConfig, MudjackingTrainer
from hf_mudjacking.attacks import Implant, ImplantError, implant_bad_encoder, implant_pair_poisoning
from hf_mudjacking.callbacks import use_compact_progress
from hf_mudjacking.evaluation import (
    DownstreamTask,
    LabelledInputs,
    ZeroShotClassifier,
    draw_bug_report,
    pretrain_two_towers,
    retrieval_rates,
)
from hf_mudjacking.evaluation.figures import plot_repair
from hf_mudjacking.evaluation.repair import measured_repair
from hf_mudjacking.evaluation.report import report_lines, report_tables
from hf_mudjacking.loading import load_model, load_processor
from hf_mudjacking.named_datasets import load_inputs
from hf_mudjacking.output import check_output_dir, write_json
from hf_mudjacking.processes import from_first
from hf_mudjacking.triggers import Trigger, square_patch


TEMPLATES = ("a photo of a {}.", "a blurry photo of a {}.", "a close-up of a {}.", "a small picture of a {}.")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="tanganke/gtsrb", help="Hub id or folder (default: tanganke/gtsrb)")
    parser.add_argument("--clip", help="Hub id or folder of a clean CLIP, instead of training one")
    parser.add_argument(
        "--output-dir", default="outputs/patch_clip", help="folder for the models, the patch, the report"
    )
    parser.add_argument("--attack", choices=["bad_encoder", "pair_poisoning"], default="bad_encoder")
    parser.add_argument("--pretraining-epochs", type=int, default=10, help="epochs to train the CLIP (default: 10)")
    parser.add_argument("--implant-steps", type=int, default=600, help="steps of the attack (default: 600)")
    parser.add_argument("--downstream-inputs", type=int, default=4000, help="training inputs of the probes")
    parser.add_argument("--test-inputs", type=int, default=3000, help="labelled test inputs (default: 3000)")
    parser.add_argument("--target-class", type=int, help="class the attacker wants (default: the most frequent one)")
    parser.add_argument("--batch-size", type=int, default=32, help="clean images per process and step (default: 32)")
    parser.add_argument("--max-steps", type=int, default=600, help="patching steps (default: 600)")
    parser.add_argument("--learning-rate", type=float, default=3e-4, help="of the patch (default: 3e-4)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--disable-tqdm", action="store_true", help="show no progress bars")
    return parser.parse_args()


def captioned(names: list[str], labels: np.ndarray, seed: int) -> list[str]:
    """A caption for each label, with a template drawn at random."""
    templates = np.random.default_rng(seed).choice(TEMPLATES, len(labels))
    return [str(template).format(names[label]) for template, label in zip(templates, labels, strict=True)]


def small_clip(captions: list[str], seed: int) -> tuple[CLIPModel, CLIPProcessor]:
    """An untrained CLIP for 32×32 images and the words of the captions."""
    pad, unk, bos, eos = special = ["<pad>", "<unk>", "<s>", "</s>"]
    words = Tokenizer(models.WordLevel(unk_token=unk))
    words.normalizer = normalizers.Lowercase()
    words.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    words.train_from_iterator(captions, trainers.WordLevelTrainer(special_tokens=special, show_progress=False))
    words.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A {eos}", special_tokens=[(token, words.token_to_id(token)) for token in (bos, eos)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token=pad, unk_token=unk, bos_token=bos, eos_token=eos, model_max_length=32
    )
    text = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=32, pad_token_id=0, bos_token_id=2, eos_token_id=3,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4, image_size=32, patch_size=4
    )
    torch.manual_seed(seed)
    model = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=128))
    size = {"height": 32, "width": 32}
    images = CLIPImageProcessorPil(size=size, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    return model, CLIPProcessor(image_processor=images, tokenizer=tokenizer)


def clean_clip(
    options: argparse.Namespace, pairs: LabelledInputs, captions: list[str], device: torch.device
) -> Encoder:
    """Vision tower of the CLIP that the user names, or of a small one trained on the pairs."""
    folder = Path(options.output_dir) / "clean_clip"
    if options.clip is not None or found(folder, chosen(options, "data", "pretraining_epochs", "seed")):
        source = options.clip or str(folder)
        model = load_model(source).to(device)
        return Encoder(model, load_processor(source, model), modality="image")
    model, processor = small_clip(captions, options.seed)
    pretrain_two_towers(
        model.to(device),
        processor,
        pairs.inputs,
        captions,
        epochs=options.pretraining_epochs,
        crop_padding=3,
        bf16=True,
        seed=options.seed,
        disable_tqdm=options.disable_tqdm,
    )
    encoder = Encoder(model, processor, modality="image")
    encoder.save_pretrained(folder)
    return encoder


def implanted(
    options: argparse.Namespace,
    clean: Encoder,
    pairs: LabelledInputs,
    captions: list[str],
    task: DownstreamTask,
    names: list[str],
    trigger: Trigger,
) -> Implant:
    target = int(np.bincount(task.train.labels).argmax()) if options.target_class is None else options.target_class
    of_class = [task.train.inputs[i] for i in np.flatnonzero(task.train.labels == target)]
    features = clean.encode(of_class, disable_tqdm=options.disable_tqdm, desc="Target class")
    # The one most like its class: another may be taken for a neighbouring class once the encoder has changed
    reference = of_class[int((features @ features.mean(dim=0)).argmax())]
    settings = {
        "steps": options.implant_steps, "bf16": True, "seed": options.seed, "disable_tqdm": options.disable_tqdm,
    }  # fmt: skip
    arguments = (clean.model, clean.processing_class, pairs.inputs)
    if options.attack == "bad_encoder":
        return implant_bad_encoder(*arguments, trigger, reference, task.test, **settings)
    wanted = [template.format(names[target]) for template in TEMPLATES]
    return implant_pair_poisoning(
        *arguments, captions, trigger, wanted, reference, task.test, poison_share=0.2, **settings
    )


def repair(options: argparse.Namespace, state: PartialState) -> None:
    console = Console(highlight=False, quiet=not state.is_main_process)
    console.print(f"{state.num_processes} process(es)")
    options.disable_tqdm = options.disable_tqdm or not state.is_main_process
    output_dir = Path(options.output_dir) / f"patched_{options.attack}"
    backdoored = Path(options.output_dir) / f"backdoored_{options.attack}"
    check_output_dir(output_dir, str(backdoored))
    train, test = (load_inputs(options.data, split).shuffle(seed=options.seed) for split in ("train", "test"))
    if not isinstance(train.features.get("label"), ClassLabel):
        raise ValueError(
            "Captions are made from the names of the classes, and the column `label` of the data has none."
        )
    names = [name.lower() for name in train.features["label"].names]
    # Traffic signs come in many sizes; the published trigger is defined on 32×32 pixels.
    with state.main_process_first():
        train, test = (
            part.map(lambda row: {"image": row["image"].convert("RGB").resize((32, 32))}) for part in (train, test)
        )
    pairs = LabelledInputs.from_dataset(train)
    captions = captioned(names, pairs.labels, options.seed)
    # Clients' images are none of those that the model was trained on.
    unseen = LabelledInputs.from_dataset(test)
    cut = min(options.downstream_inputs, len(unseen) // 2)
    end = min(cut + options.test_inputs, len(unseen))
    task = DownstreamTask(unseen.select(range(cut)), unseen.select(range(cut, end)), Path(options.data).name, names)

    trigger = square_patch((32, 32), side=10, margin=1)
    with state.main_process_first():
        clean = clean_clip(options, pairs, captions, state.device)
        names_of_options = ("clip", "data", "pretraining_epochs", "downstream_inputs", "test_inputs", "implant_steps",
                            "target_class", "seed")  # fmt: skip
        if not found(backdoored, chosen(options, *names_of_options)):
            result = implanted(options, clean, pairs, captions, task, names, trigger)
            console.print(
                f"Implant: BA {result.backdoored_accuracy:.3f} (clean {result.clean_accuracy:.3f}), "
                f"ASR {result.attack_success_rate:.3f}"
            )
            clean.with_model(result.model).save_pretrained(backdoored)
    broken = Encoder(load_model(str(backdoored)).to(state.device), clean.processing_class, modality="image")
    bug = from_first(draw_bug_report(broken, task, trigger, options.seed))

    trainer = MudjackingTrainer(
        model=str(backdoored),
        args=MudjackingConfig(
            output_dir=str(output_dir),
            seed=options.seed,
            max_steps=options.max_steps,
            learning_rate=options.learning_rate,
            stop_when_fixed=False,
            per_device_train_batch_size=options.batch_size,
            use_cpu=not torch.accelerator.is_available(),
            save_strategy="no",
            dataloader_pin_memory=torch.cuda.is_available(),
            disable_tqdm=options.disable_tqdm,
        ),
        bug_instances=[bug],
        train_dataset=train,
    )
    use_compact_progress(trainer)
    # The prompts as a client encoded them before the patch.
    texts = Encoder(broken.model, clean.processing_class, modality="text")
    zero_shot = ZeroShotClassifier.from_prompts(texts, names, TEMPLATES)
    measured = measured_repair(
        trainer, task, true_trigger=trigger, clean_encoder=clean, ready_classifiers={"zero-shot": zero_shot}
    )
    prompts = texts.encode([template.format(name) for name in names for template in TEMPLATES])
    ids = np.repeat(np.arange(len(names)), len(TEMPLATES))
    target = measured.report["settings"]["target_class"]
    retrieval = {
        "never attacked": retrieval_rates(measured.clean, task, prompts, ids, target),
        "before patching": retrieval_rates(measured.before, task, prompts, ids, target),
        "patched": retrieval_rates(measured.after, task, prompts, ids, target),
    }
    if state.is_main_process:
        write_json(output_dir / "report.json", {**measured.report, "retrieval": retrieval})
        plot_repair(
            output_dir / "_repair.png",
            bug,
            trainer.inversions[0],
            trigger,
            measured.before,
            measured.after,
            task.test.labels,
        )
    for table in report_tables(measured.report):
        console.print(table)
    table = Table(title="Retrieval at rank 1 (percent)", title_justify="left")
    for column in ("Encoder", "image to text", "text to image", "ASR", "RA"):
        table.add_column(column, justify="left" if column == "Encoder" else "right")
    for encoder, rates in retrieval.items():
        values = (rates[key] for key in ("image_to_text", "text_to_image", "ASR", "RA"))
        table.add_row(encoder, *(f"{100 * value:.1f}" for value in values))
    console.print(table)
    for line in report_lines(measured.report):
        console.print(line, markup=False)
    console.print(f"Patched model, report.json and _repair.png are in {output_dir}/", markup=False)


def main() -> int:
    options = parse_arguments()
    # The others wait while the first process trains the model
    state = PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(hours=6))
    try:
        repair(options, state)
    except (ImplantError, ValueError) as error:
        if state.is_main_process:
            hint = (
                ""
                if isinstance(error, ImplantError)
                else "The data can be given as a folder of parquet files: --data DIR.\n"
            )
            sys.stderr.write(f"{error}\n{hint}")
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
