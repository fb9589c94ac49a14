# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""One file a rate, each of which `evaluate.load` takes without network."""

from __future__ import annotations

from pathlib import Path


METRICS = ("attack_success_rate", "clean_accuracy", "robust_accuracy")


def metric_path(name: str) -> str:
    """Where in the installed package the file of a rate is.

    Args:
        name (`str`): `"attack_success_rate"`, `"clean_accuracy"` or `"robust_accuracy"`.

    Returns:
        `str`: What `evaluate.load` takes.

    Raises:
        ValueError: If there is no such rate.

    Example:

    ```python
    >>> asr = evaluate.load(metric_path("attack_success_rate"))
    >>> asr.compute(predictions=[9, 9, 3, 9], references=[1, 2, 3, 9], target=9)
    {'attack_success_rate': 0.6666666666666666}
    ```
    """
    if name not in METRICS:
        raise ValueError(f"There is no metric `{name}`; choose one of {', '.join(METRICS)}.")
    return str(Path(__file__).with_name(f"{name}.py"))
