# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""Latent stamps: what a misclassified input has inside the encoder and its reference has not, carried by other inputs.

Where each picture has a trigger of its own, nothing in a report carries other pictures anywhere. But all triggers of a backdoor
come to the same inside the encoder, and there x_b and x_r differ by that, and by what two pictures of a class differ by anyway.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .bug_instance import BugInstance
from .encoder import Encoder
from .modes import comparison_mode
from .preprocessing import RawInput


# How far inside the encoder, in quarters.
_DEPTH = 3
# Fractional parts of its multiples are spread evenly over 0 to 1.
_GOLDEN = 0.5 * (5**0.5 - 1)


class LatentStamps:
    """Adds to the hidden states of some rows of a batch the difference that a report makes there.

    Its length is a share of that of the hidden state, from nothing to `strength`, which goes by the number of the row: a row is
    stamped alike in a batch of any size. The difference is that of the encoder before patching. This costs no forward pass.

    Args:
        encoder (`Encoder`): The encoder before patching.
        bugs (`Sequence[BugInstance | None]`): Row i of the dataset carries the difference of number i mod U; `None` is nothing.
        strength (`float`): Largest share.

    Attributes:
        forwards (`int`): Inputs that went through the model for it.

    Raises:
        ValueError: If the model gives no hidden states, or none of its modules gives the one that is needed.
    """

    def __init__(self, encoder: Encoder, bugs: Sequence[BugInstance | None], strength: float) -> None:
        self.strength = strength
        given = [bug for bug in bugs if bug is not None]
        self.layer, hidden = inner_layer(encoder, [x for bug in given for x in (bug.misclassified, bug.reference)])
        self.forwards = len(hidden)
        difference = (hidden[0::2] - hidden[1::2]).float()
        self.directions = difference / _length(difference)
        numbers = iter(range(len(given)))
        self._number_of = [None if bug is None else next(numbers) for bug in bugs]

    @contextmanager
    def carried(self, rows: Tensor, first: int) -> Iterator[None]:
        """Within it, the model's batches carry the differences, in backward passes that compute activations again too.

        Args:
            rows (`LongTensor` of shape `(B,)`): Numbers of B rows in the dataset.
            first (`int`): Where they begin in the batches.
        """
        places, numbers, shares = [], [], []
        for i, row in enumerate(rows.tolist()):
            turn, stamp = divmod(row, len(self._number_of))
            if (number := self._number_of[stamp]) is not None:
                places.append(first + i)
                numbers.append(number)
                shares.append(self.strength * (_GOLDEN * (turn + 1) % 1))

        def stamp_output(module: nn.Module, inputs: Any, output: Any) -> Any:
            hidden = _hidden(output)
            at = torch.tensor(places, device=hidden.device)
            share = torch.tensor(shares, device=hidden.device).view(-1, *[1] * (hidden.dim() - 1))
            added = share * _length(hidden[at].detach()) * self.directions[numbers].to(hidden.device)
            hidden = hidden.index_add(0, at, added.to(hidden.dtype))
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        handle = self.layer.register_forward_hook(stamp_output) if places else None
        try:
            yield
        finally:
            if handle is not None:
                handle.remove()


def inner_layer(encoder: Encoder, inputs: Sequence[RawInput]) -> tuple[nn.Module, Tensor]:
    """The module whose output is the hidden state three quarters of the way through the encoder, and that state.

    Args:
        encoder (`Encoder`): Any encoder.
        inputs (`Sequence`): N raw inputs.

    Returns:
        `tuple[torch.nn.Module, FloatTensor]`: The module, and its output `(N, ...)`.

    Raises:
        ValueError: If the model gives no hidden states, or none of its modules gives that one.
    """
    made: list[tuple[nn.Module, Any]] = []
    handles = [m.register_forward_hook(lambda m, _, output: made.append((m, output))) for m in encoder.model.modules()]
    try:
        with torch.no_grad(), comparison_mode(encoder.model, checkpointing=False):
            _, states = encoder.features_and_hidden_states(encoder.preprocess(inputs))
    finally:
        for handle in handles:
            handle.remove()
    wanted = states[_DEPTH * len(states) // 4]
    runs = Counter(module for module, _ in made)
    # The outermost, which ends last
    for module, output in reversed(made):
        if _hidden(output) is wanted and runs[module] == 1:
            return module, wanted
    raise ValueError(f"No module of `{type(encoder.model).__name__}` gives the hidden state that far inside it.")


def _hidden(output: Any) -> Any:
    """The hidden state in what a layer gives."""
    return output[0] if isinstance(output, tuple) else output


def _length(x: Tensor) -> Tensor:
    """Length of each row of `(N, ...)`, float32, of shape `(N, 1, ...)`."""
    return x.float().flatten(1).norm(dim=1).view(-1, *[1] * (x.dim() - 1))
