# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""Pictures of a report and of a repair: what was reported, what was found, what became of the features."""

from __future__ import annotations

import os
from textwrap import shorten
from typing import Any

import numpy as np
from sklearn.decomposition import PCA

from ..bug_instance import BugInstance
from ..inversion import InvertedTrigger
from ..inversion.result import EXPLAINED
from ..screening import Screening
from ..triggers import AdditiveTrigger, BlendTrigger, ImageTrigger, PatchTrigger, TextTrigger, Trigger, WarpTrigger
from .checks import TaskFeatures


# Grey of what is not part of a trigger, and light grey around it.
_GREY, _LIGHT = 128, 190
# Largest deviation from grey that a faint signal is amplified to, in levels, and longest arrow of a warp, in control points.
_AMPLIFIED, _LONGEST_ARROW = 100, 1.2


def plot_repair(
    path: str | os.PathLike[str],
    bug: BugInstance,
    found: InvertedTrigger,
    true_trigger: Trigger | None = None,
    before: TaskFeatures | None = None,
    after: TaskFeatures | None = None,
    labels: np.ndarray | None = None,
) -> None:
    """Draw x_b, x_r, the attribution, the trigger found beside the true one, and features before and after in 2-D.

    The picture of a text report shows the client's words, as that of an image report shows its pixels.

    Args:
        path (`str` or `os.PathLike`): PNG file to write.
        bug (`BugInstance`): The report.
        found (`InvertedTrigger`): Result of the inversion.
        true_trigger (`Trigger`, *optional*): The attacker's trigger, when it is known.
        before, after (`TaskFeatures`, *optional*): Features before and after patching; both or none.
        labels (`np.ndarray`, *optional*): Classes of the test inputs, for colours.
    """
    from matplotlib.figure import Figure

    # Two points at least make a plane
    with_features = before is not None and after is not None and len(before.test) > 1
    panels = 4 + (true_trigger is not None)
    figure = Figure(figsize=(2.6 * panels if bug.modality == "image" else 11.0, 9.0 if with_features else 3.6))
    top, *bottom = figure.subfigures(2, 1, height_ratios=[1, 1.7]) if with_features else [figure]
    draw = _draw_image_report if bug.modality == "image" else _draw_text_report
    draw(top, bug, found, true_trigger)
    if with_features:
        place = {"left": 0.075, "right": 0.98, "top": 0.94, "bottom": 0.15, "wspace": 0.05}
        panes = bottom[0].subplots(1, 2, sharex=True, sharey=True, gridspec_kw=place)
        _plot_features(panes, before, after, labels)
    figure.savefig(path, dpi=120)


def plot_inspection(
    path: str | os.PathLike[str],
    bug: BugInstance,
    screening: Screening,
    transfer_by_size: list[tuple[float, float]],
    true_trigger: Trigger | None = None,
) -> None:
    """Draw what a report was judged by: x_b, x_r, what was found, the true trigger, and transfer against size.

    Args:
        path (`str` or `os.PathLike`): PNG file to write.
        bug (`BugInstance`): The report.
        screening (`Screening`): The verdict.
        transfer_by_size (`list[tuple[float, float]]`): See [`~hf_mudjacking.screening.transfer_by_size`]; unused for texts.
        true_trigger (`Trigger`, *optional*): The attacker's trigger, when it is known.
    """
    from matplotlib.figure import Figure

    found = screening.found
    if bug.modality == "text":
        figure = Figure(figsize=(11.0, 4.2))
        title, body = figure.subfigures(2, 1, height_ratios=[0.6, 3.6])
        _draw_text_report(body, bug, found, true_trigger)
    else:
        panels = 4 + (true_trigger is not None)
        figure = Figure(figsize=(2.8 * panels, 3.6))
        title, body = figure.subfigures(2, 1, height_ratios=[0.5, 3.1])
        place = {"left": 0.02, "right": 0.98, "top": 0.88, "bottom": 0.16, "wspace": 0.15}
        axes = body.subplots(1, panels, gridspec_kw=place)
        _show(axes[0], bug.misclassified, "Misclassified input x_b")
        _show(axes[1], bug.reference, "Reference input x_r")
        _draw_trigger(axes[2], found.trigger, _name_of(screening.verified), f"transfer {found.score:.2f}")
        if true_trigger is not None:
            _draw_trigger(axes[3], true_trigger, "True trigger")
        axes[-1].plot(*zip(*transfer_by_size, strict=True), marker="o", color="crimson")
        patch = isinstance(found.trigger, PatchTrigger)
        axes[-1].set_title(f"Transfer by {'size' if patch else 'strength'}", fontsize=10)
        axes[-1].set_xlabel("share of the picture" if patch else "share of its strength", fontsize=8)
        axes[-1].set_xlim(left=0)
        axes[-1].set_ylim(min(0.0, *(transfer for _, transfer in transfer_by_size)) - 0.05, 1.05)
        axes[-1].tick_params(labelsize=7)
        axes[-1].locator_params(axis="x", nbins=4)
        # Its numbers stand to the left of it, where the next panel is
        box = axes[-1].get_position()
        axes[-1].set_position((box.x0 + 0.02, box.y0 + 0.04, box.width - 0.02, box.height - 0.06))
    title.text(
        0.02, 0.3, f"Report {_plain(bug.name)}: {screening.verdict} (believed {screening.believed:.2f})", fontsize=12
    )
    figure.savefig(path, dpi=120)


def _draw_image_report(top: Any, bug: BugInstance, found: InvertedTrigger, true_trigger: ImageTrigger | None) -> None:
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
    bar.set_ticks([-limit, 0, limit], labels=[f"{-limit:.2g}", "0", f"{limit:.2g}"])
    bar.set_label("what covering a place takes from the score", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    # The size of a family that covers the whole picture says nothing
    size = f", area {found.area:.1%}" if isinstance(found.trigger, PatchTrigger) else ""
    _draw_trigger(axes[3], found.trigger, _name_of(found.evidence >= EXPLAINED), f"transfer {found.score:.2f}{size}")
    if true_trigger is not None:
        same = type(found.trigger) is type(true_trigger)
        name, value = list(found.trigger.overlap(true_trigger).items())[-1] if same else ("", 0.0)
        note = f"{'IoU' if name == 'iou' else name} {value:.2f}" if same else "of another family"
        _draw_trigger(axes[4], true_trigger, "True trigger", note)


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
    name_found = _name_of(found.evidence >= EXPLAINED)
    lines = {"Reference input x_r": bug.reference, name_found: found_line}
    if true_trigger is not None:
        lines["True trigger"] = f"{' … '.join(true_trigger.spans)}   ({true_trigger.describe()})"
    for i, (name, text) in enumerate(lines.items()):
        top.text(0.02, 0.95 - 0.075 * i, f"{name}: {_plain(shorten(text, 130, placeholder=' …'))}", fontsize=9)
    part = f", {len(words)} of {len(found.words)} words" if len(words) < len(found.words) else ""
    top.text(0.02, 0.69, f"Misclassified input x_b, word by word{part} (red: {name_found.lower()})", fontsize=9)


def _name_of(is_trigger: bool) -> str:
    """What that is called which was found."""
    return "Inverted trigger" if is_trigger else "Best candidate, unverified"


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
        clean = projection.transform(features.test[rows].numpy())
        colors = {"color": "0.6"} if labels is None else {"c": np.asarray(labels)[rows], "cmap": "tab10"}
        name = "clean test inputs" + ("" if labels is None else " (colour: class)")
        axis.scatter(*clean.T, s=10, alpha=0.6, label=name, **colors)
        if features.stamped is not None:
            stamped = projection.transform(features.stamped[rows].numpy())
            axis.scatter(*stamped.T, c="black", marker="x", s=12, linewidths=0.7, alpha=0.6, label="with the trigger")
        # Where both lie in one place, as they do after a repair, x_r is seen within x_b
        for part, marker, size, name in (
            (features.misclassified, "*", 620, "x_b"),
            (features.reference, "P", 110, "x_r"),
        ):
            if part is None:
                continue
            point = projection.transform(part.numpy())[0]
            axis.scatter(
                *point, marker=marker, s=size, c="white", edgecolors="red", linewidths=1.5, label=name, zorder=3
            )
        axis.set_title(title, fontsize=11)
        axis.set_xlabel("first principal component")
    axes[0].set_ylabel("second principal component")
    handles, names = axes[1].get_legend_handles_labels()
    # Below both, where there are no points; markers of one size
    legend = axes[0].figure.legend(handles, names, fontsize=9, loc="lower center", ncol=len(names), frameon=False)
    for handle in legend.legend_handles:
        handle.set_sizes([70])


def _show(axis: object, image: object, title: str, note: str = "") -> None:
    axis.imshow(np.asarray(image))
    axis.set_title(title, fontsize=10)
    axis.set_xlabel(note, fontsize=9)
    axis.set_xticks([])
    axis.set_yticks([])


def _draw_trigger(axis: Any, trigger: Trigger, title: str, note: str = "") -> None:
    """A trigger of any family of images: as pixels, or a warp as arrows from where each pixel is read."""
    if isinstance(trigger, WarpTrigger):
        _draw_warp(axis, trigger, title, note)
    elif isinstance(trigger, (PatchTrigger, BlendTrigger, AdditiveTrigger)):
        _show(axis, trigger_picture(trigger), title, note)
    else:
        # A trigger that is a network has no picture of its own
        _show(axis, np.full((1, 1, 3), _LIGHT, dtype=np.uint8), title, note or trigger.describe())


def trigger_picture(trigger: PatchTrigger | BlendTrigger | AdditiveTrigger) -> np.ndarray:
    """A trigger `(H, W, 3)`, 8 bit: a patch on light grey, a signal amplified about grey, a pattern as it is mixed in."""
    if isinstance(trigger, PatchTrigger):
        return np.where(trigger.mask[..., None], trigger.pattern, np.uint8(_LIGHT))
    if isinstance(trigger, BlendTrigger):
        # A pattern that was found may go beyond what a picture can show
        return np.where(trigger.opacity[..., None] > 0, trigger.pattern.clip(0, 255), _LIGHT).astype(np.uint8)
    change = trigger.delta
    return (_GREY + change * (_AMPLIFIED / np.abs(change).max())).round().clip(0, 255).astype(np.uint8)


def _draw_warp(axis: Any, trigger: WarpTrigger, title: str, note: str) -> None:
    _, height, width = trigger.flow.shape
    y, x = np.mgrid[0:height, 0:width]
    # In control points, the longest arrow a little longer than their distance
    longest = float(np.linalg.norm(trigger.flow, axis=0).max())
    dx, dy = trigger.flow * (_LONGEST_ARROW / longest)
    axis.quiver(x, y, dx, dy, angles="xy", scale_units="xy", scale=1, color="crimson", width=0.012)
    axis.set_xlim(-1, width)
    axis.set_ylim(height, -1)
    axis.set_aspect("equal")
    axis.set_title(title, fontsize=10)
    axis.set_xlabel(note or f"longest arrow: {longest:.1%} of the side", fontsize=9)
    axis.set_xticks([])
    axis.set_yticks([])
