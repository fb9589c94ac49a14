# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""Latent stamps: what a misclassified input has inside the encoder and its reference has not, carried by other inputs.

Where each picture has a trigger of its own, nothing in a report carries other pictures anywhere. But all triggers of a backdoor
come to the same inside the encoder, and there x_b and x_r differ by that, and by what two pictures of a class differ by anyway.
Where that is not all of it, what else leads to h(x_b) there is found by a gradient.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .bug_instance import BugInstance
from .data import turn_and_stamp
from .encoder import Encoder
from .modes import comparison_mode, hooked
from .preprocessing import RawInput


# How far inside the encoder, in quarters of its layers; something must lie behind that can learn to undo it.
_DEPTH = 3
# Pictures of reports that go through the model at once.
_BATCH = 16
# How far rows are pushed along the gradient, as a share of the strength.
_PUSH = 1 / 6
# Fractional parts of its multiples are spread evenly over 0 to 1.
_GOLDEN = 0.5 * (5**0.5 - 1)


class LatentStamps:
    """Changes the hidden states of some rows of a batch as a report does, or as would lead to where it led.

    Rows take turns. One carries the difference that x_b and x_r had before patching, of a length between nothing and `strength` of
    its hidden state's, at no cost. The next is pushed by a sixth of `strength` along the gradient of its cosine with h(x_b), in the
    model as it is now (latent adversarial training, as in Casper et al., "Defending Against Unforeseen Failure Modes with Latent
    Adversarial Training", 2024). All goes by the number of the row, so that it is stamped alike in a batch of any size.

    Args:
        encoder (`Encoder`): The encoder that will be patched, before that.
        bugs (`Sequence[BugInstance | None]`): What rows of the dataset carry in turn; `None` is nothing.
        strength (`float`): Largest share.
        spend (`Callable`): Told, at the start and for each batch, how many inputs go through the model, a backward pass counted as
            two.

    Raises:
        ValueError: If the model gives no hidden states, or none of its modules gives the one that is needed.
    """

    def __init__(
        self, encoder: Encoder, bugs: Sequence[BugInstance | None], strength: float, spend: Callable[[int], None]
    ) -> None:
        self.encoder = encoder
        self.strength = strength
        self.spend = spend
        given = [bug for bug in bugs if bug is not None]
        self.layer = inner_layer(encoder, given[0].reference)
        self.targets, misclassified = self._inside([bug.misclassified for bug in given])
        self.directions = _unit(misclassified - self._inside([bug.reference for bug in given])[1])
        spend(2 * len(given))
        numbers = iter(range(len(given)))
        self._number_of = [None if bug is None else next(numbers) for bug in bugs]

    @contextmanager
    def carried(self, pixels: Tensor, rows: Tensor, first: int) -> Iterator[None]:
        """Within it, the model's batches are changed, in backward passes that compute activations again too.

        Args:
            pixels (`FloatTensor` of shape `(B, C, H, W)`): What the model gets of B rows.
            rows (`LongTensor` of shape `(B,)`): Their numbers in the dataset.
            first (`int`): Where they begin in the batches.
        """
        placed = [(i, *turn_and_stamp(row, len(self._number_of))) for i, row in enumerate(rows.tolist())]
        mine = [(i, turn, self._number_of[stamp]) for i, turn, stamp in placed if self._number_of[stamp] is not None]
        differing, pushed = ([row for row in mine if row[1] % 2 == parity] for parity in (0, 1))
        # Nothing too: processes add up what each of them spends
        self.spend(3 * len(pushed))
        at = torch.tensor([first + i for i, _, _ in differing + pushed], device=pixels.device)
        shares = torch.tensor([self.strength * (_GOLDEN * (turn // 2 + 1) % 1) for _, turn, _ in differing])
        directions = self.directions[[number for _, _, number in differing]]
        changes = [shares.to(directions).view(-1, *[1] * (directions.dim() - 1)) * directions]
        if pushed:
            ways = self._ways([number for _, _, number in pushed], pixels[[i for i, _, _ in pushed]])
            changes.append(_PUSH * self.strength * ways)
        change = torch.cat(changes)

        def stamp_output(module: nn.Module, inputs: Any, output: Any) -> Any:
            hidden = _hidden(output)
            return _with_hidden(
                output, hidden.index_add(0, at, (_length(hidden[at].detach()) * change).to(hidden.dtype))
            )

        with hooked([self.layer] if mine else [], stamp_output):
            yield

    @torch.no_grad()
    def _inside(self, inputs: list[RawInput]) -> tuple[Tensor, Tensor]:
        """Features `(N, D)` of raw inputs, and what the layer gives of them `(N, ...)`."""
        features, hidden = [], []
        looking = hooked([self.layer], lambda module, _, output: hidden.append(_hidden(output)))
        with looking, comparison_mode(self.encoder.model, checkpointing=False):
            for start in range(0, len(inputs), _BATCH):
                features.append(self.encoder.features(self.encoder.preprocess(inputs[start : start + _BATCH])))
        return torch.cat(features), torch.cat(hidden)

    def _ways(self, numbers: list[int], pixels: Tensor) -> Tensor:
        """For each of N rows, the direction in which its hidden state comes nearest to where a report led: `(N, ...)`."""
        begin: list[Tensor] = []

        def begin_here(module: nn.Module, inputs: Any, output: Any) -> Any:
            begin.append(_hidden(output).detach().requires_grad_(True))
            return _with_hidden(output, begin[-1])

        # Activations that are computed again are of no use here, and one kind of that refuses `grad`
        plain = comparison_mode(self.encoder.model, checkpointing=False)
        with hooked([self.layer], begin_here), torch.enable_grad(), plain:
            features = self.encoder.features({"pixel_values": pixels})
            arrived = (features * self.targets[numbers].to(features)).sum()
            (gradient,) = torch.autograd.grad(arrived, begin[-1])
        return _unit(gradient)


def inner_layer(encoder: Encoder, x: RawInput) -> nn.Module:
    """The module whose output is the hidden state three quarters of the way through the encoder, but not the last.

    Args:
        encoder (`Encoder`): Any encoder.
        x (`PIL.Image.Image` or `str`): A raw input to run it on.

    Raises:
        ValueError: If the model gives no hidden states, or none of its modules gives that one.
    """
    made: list[tuple[nn.Module, Any]] = []
    looking = hooked(encoder.model.modules(), lambda module, _, output: made.append((module, output)))
    with looking, torch.no_grad(), comparison_mode(encoder.model, checkpointing=False):
        _, states = encoder.features_and_hidden_states(encoder.preprocess([x]))
    # In most models the first one is that of the embeddings
    wanted = states[max(min(_DEPTH * (len(states) - 1) // 4, len(states) - 2), 0)]
    runs = Counter(module for module, _ in made)
    # The outermost, which ends last
    for module, output in reversed(made):
        if _hidden(output) is wanted and runs[module] == 1:
            return module
    raise ValueError(f"No module of `{type(encoder.model).__name__}` gives the hidden state that far inside it.")


def _hidden(output: Any) -> Any:
    """The hidden state in what a layer gives."""
    return output[0] if isinstance(output, tuple) else output


def _with_hidden(output: Any, hidden: Tensor) -> Any:
    """What a layer gives, with another hidden state."""
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


def _length(x: Tensor) -> Tensor:
    """Length of each row of `(N, ...)`, float32, of shape `(N, 1, ...)`."""
    return x.float().flatten(1).norm(dim=1).view(-1, *[1] * (x.dim() - 1))


def _unit(x: Tensor) -> Tensor:
    """Rows of `(N, ...)` scaled to length 1; what is nothing stays so."""
    return x.float() / _length(x).clamp_min(torch.finfo(torch.float32).tiny)
