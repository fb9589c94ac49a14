# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""One picture of a repair: what was reported, what was found, what became of the features."""

from __future__ import annotations

import logging
import os
from importlib.util import find_spec
from textwrap import shorten
from typing import Any

import numpy as np
from sklearn.decomposition import PCA

from ..bug_instance import BugInstance
from ..inversion import InvertedTrigger
from ..triggers import PatchTrigger, TextTrigger, Trigger
from .checks import TaskFeatures


logger = logging.getLogger(__name__)


def plot_repair(
    path: str | os.PathLike[str],
    bug: BugInstance,
    found: InvertedTrigger,
    true_trigger: Trigger | None = None,
    before: TaskFeatures | None = None,
    after: TaskFeatures | None = None,
    labels: np.ndarray | None = None,
) -> bool:
    """Draw x_b, x_r, the attribution, the trigger found beside the true one, and features before and after in 2-D.

    The picture of a text report shows the client's words, as that of an image report shows its pixels.

    Args:
        path (`str` or `os.PathLike`): PNG file to write.
        bug (`BugInstance`): The report.
        found (`InvertedTrigger`): Result of the inversion.
        true_trigger (`Trigger`, *optional*): The attacker's trigger, when it is known.
        before, after (`TaskFeatures`, *optional*): Features before and after patching; both or none.
        labels (`np.ndarray`, *optional*): Classes of the test inputs, for colours.

    Returns:
        `bool`: Whether the picture was drawn; without matplotlib it is not, and a warning says how to get it.
    """
    if find_spec("matplotlib") is None:
        logger.warning("No picture was drawn: it needs matplotlib (`pip install hf-mudjacking[plot]`).")
        return False
    from matplotlib.figure import Figure

    with_features = before is not None and after is not None
    panels = 4 + (true_trigger is not None)
    figure = Figure(figsize=(2.6 * panels if bug.modality == "image" else 11.0, 9.0 if with_features else 3.6))
    top, *bottom = figure.subfigures(2, 1, height_ratios=[1, 1.7]) if with_features else [figure]
    draw = _draw_image_report if bug.modality == "image" else _draw_text_report
    draw(top, bug, found, true_trigger)
    if with_features:
        place = {"left": 0.06, "right": 0.98, "top": 0.94, "bottom": 0.1, "wspace": 0.05}
        panes = bottom[0].subplots(1, 2, sharex=True, sharey=True, gridspec_kw=place)
        _plot_features(panes, before, after, labels)
    figure.savefig(path, dpi=120)
    return True


def _draw_image_report(top: Any, bug: BugInstance, found: InvertedTrigger, true_trigger: PatchTrigger | None) -> None:
    place = {"left": 0.02, "right": 0.98, "top": 0.9, "bottom": 0.16}
    axes = top.subplots(1, 4 + (true_trigger is not None), gridspec_kw=place)
    _show(axes[0], bug.misclassified, "Misclassified input x_b")
    _show(axes[1], bug.reference, "Reference input x_r")
    limit = float(np.abs(found.attribution).max()) or 1.0
    heat = axes[2].imshow(found.attribution, cmap="RdBu_r", vmin=-limit, vmax=limit)
    axes[2].set_title("Attribution", fontsize=10)
    axes[2].set_xticks([])
    axes[2].set_yticks([])
    bar = top.colorbar(heat, cax=axes[2].inset_axes((0, -0.07, 1, 0.04)), orientation="horizontal")
    bar.set_label("fall of the cosine distance to x_r", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    _show(axes[3], _cutout(found.trigger), "Inverted trigger", f"transfer {found.score:.2f}, area {found.area:.1%}")
    if true_trigger is not None:
        _show(axes[4], _cutout(true_trigger), "True trigger", f"IoU {found.trigger.overlap(true_trigger)['iou']:.2f}")


def _draw_text_report(top: Any, bug: BugInstance, found: InvertedTrigger, true_trigger: TextTrigger | None) -> None:
    axis = top.subplots(gridspec_kw={"left": 0.07, "right": 0.98, "top": 0.66, "bottom": 0.3})
    words, scores = _around_trigger(found)
    within = {word.casefold() for word in found.trigger.words}
    colors = ["crimson" if word.casefold() in within else "0.6" for word in words]
    axis.bar(range(len(words)), scores, color=colors)
    axis.axhline(0, color="black", linewidth=0.6)
    axis.set_xticks(range(len(words)), [_plain(word) for word in words], rotation=60, ha="right", fontsize=8)
    for label, color in zip(axis.get_xticklabels(), colors, strict=True):
        label.set_color("crimson" if color == "crimson" else "black")
    axis.set_ylabel("fall of the cosine\ndistance to x_r", fontsize=8)
    axis.set_xlim(-0.7, len(words) - 0.3)
    axis.tick_params(axis="y", labelsize=7)
    found_line = f"{' … '.join(found.trigger.spans)}   ({found.trigger.describe()}, transfer {found.score:.2f})"
    lines = {"Reference input x_r": bug.reference, "Inverted trigger": found_line}
    if true_trigger is not None:
        lines["True trigger"] = f"{' … '.join(true_trigger.spans)}   ({true_trigger.describe()})"
    for i, (name, text) in enumerate(lines.items()):
        top.text(0.02, 0.95 - 0.075 * i, f"{name}: {_plain(shorten(text, 130, placeholder=' …'))}", fontsize=9)
    top.text(0.02, 0.69, "Misclassified input x_b, word by word (red: inverted trigger)", fontsize=9)


def _around_trigger(found: InvertedTrigger) -> tuple[list[str], np.ndarray]:
    """Up to 40 words of x_b with their scores, those about the trigger's core."""
    middle = int(np.flatnonzero(found.core).mean()) if found.core.any() else 0
    first = max(0, min(middle - 20, len(found.words) - 40))
    return found.words[first : first + 40], found.attribution[first : first + 40]


def _plain(text: str) -> str:
    """A text that matplotlib does not take for mathematics."""
    return text.replace("$", r"\$")


def _plot_features(axes: np.ndarray, before: TaskFeatures, after: TaskFeatures, labels: np.ndarray | None) -> None:
    # One projection for both, fitted on clean features before patching: what moved is seen to have moved.
    projection = PCA(2, random_state=0).fit(before.test.numpy())
    rows = slice(0, 600)
    for axis, features, title in ((axes[0], before, "Features before patching"), (axes[1], after, "Features after")):
        clean, stamped = (projection.transform(part[rows].numpy()) for part in (features.test, features.stamped))
        colors = {"color": "0.6"} if labels is None else {"c": np.asarray(labels)[rows], "cmap": "tab10"}
        name = "clean test inputs" + ("" if labels is None else " (colour: class)")
        axis.scatter(*clean.T, s=10, alpha=0.6, label=name, **colors)
        axis.scatter(*stamped.T, c="black", marker="x", s=12, linewidths=0.7, alpha=0.6, label="with the trigger")
        for part, marker, name in ((features.misclassified, "*", "x_b"), (features.reference, "P", "x_r")):
            point = projection.transform(part.numpy())[0]
            axis.scatter(
                *point, marker=marker, s=220, c="white", edgecolors="red", linewidths=1.8, label=name, zorder=3
            )
        axis.set_title(title, fontsize=11)
        axis.set_xlabel("first principal component")
    axes[0].set_ylabel("second principal component")
    axes[1].legend(fontsize=8, loc="best")


def _show(axis: object, image: object, title: str, note: str = "") -> None:
    axis.imshow(np.asarray(image))
    axis.set_title(title, fontsize=10)
    axis.set_xlabel(note, fontsize=9)
    axis.set_xticks([])
    axis.set_yticks([])


def _cutout(trigger: PatchTrigger) -> np.ndarray:
    """The trigger on light grey, with a grey of its own for what is not part of it."""
    return np.where(trigger.mask[..., None], trigger.pattern, np.uint8(190))
