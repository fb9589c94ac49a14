# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""Features of many inputs: in memory while they are few, else in a file that all processes of a machine map."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import Tensor

from .clean_inputs import CleanInputs
from .encoder import Encoder
from .processes import done_by_all, gathered, place_on_node


# Bytes up to which the features of one process stay in its memory.
_IN_MEMORY = 256 * 2**20


def stored_features(
    encoder: Encoder,
    inputs: CleanInputs,
    batch_size: int,
    disable_tqdm: bool,
    desc: str,
    num_workers: int = 0,
    in_memory: int = _IN_MEMORY,
) -> Tensor:
    """Features of all inputs, each computed by one process of the machine; every process of the run must call it.

    One process keeps up to 256 MiB of them in its memory. Otherwise they lie in a temporary file (`TMPDIR` says where) that
    the processes of a machine write their parts of and map, so that the system holds one copy for all of them and may drop
    what is not in use. The file has no name any more when this returns: it is gone with the last process, whatever ends it.

    On several machines each computes and keeps its own copy: any process may be given any row, and computing one costs less
    than asking another machine for it in every step.

    Args:
        encoder (`Encoder`): The encoder; each process computes its part alone.
        inputs (`CleanInputs`): N inputs, the same in every process.
        batch_size (`int`): Inputs per forward pass.
        disable_tqdm (`bool`): Whether to hide the progress bar.
        desc (`str`): Its label.
        num_workers (`int`, *optional*, defaults to 0): Processes that read and prepare images ahead.
        in_memory (`int`, *optional*, defaults to 256 MiB): Bytes up to which the features of one process stay in memory.

    Returns:
        `FloatTensor` of shape `(N, D)`: On CPU.

    Raises:
        ValueError: In every process, if one finds a feature that is NaN or infinite, or an input that cannot be read.
    """
    settings = {"batch_size": batch_size, "disable_tqdm": disable_tqdm, "desc": desc, "num_workers": num_workers}
    number, count, first = place_on_node()
    shape = (len(inputs), encoder.feature_dim)
    if count == 1 and 4 * shape[0] * shape[1] <= in_memory:
        return done_by_all(lambda: encoder.encode(inputs, **settings, out=torch.empty(shape)))[0]
    # Windows does not remove what is mapped
    with tempfile.TemporaryDirectory(prefix="hf_mudjacking_", ignore_cleanup_errors=True) as folder:
        # The first process of each machine lends its folder
        path = Path(gathered(folder)[first]) / "features"
        features = torch.from_file(str(path), shared=True, size=shape[0] * shape[1], dtype=torch.float32).view(shape)
        start, stop = (len(inputs) * part // count for part in (number, number + 1))
        part = torch.utils.data.Subset(inputs, range(start, stop))
        done_by_all(lambda: encoder.encode(part, **settings, out=features[start:stop]).shape)
    return features
