# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""The modes that a model is put into: nothing random, nothing running, some weights at rest, some modules watched."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer


def norm_parameters(model: nn.Module, trainable_only: bool = True) -> list[nn.Parameter]:
    """Affine parameters of BatchNorm layers, which rest while a model is patched, as in the released Mudjacking code."""
    return [
        parameter
        for module in model.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
        for parameter in module.parameters(recurse=False)
        if parameter.requires_grad or not trainable_only
    ]


def freeze_norms(model: nn.Module) -> None:
    """Freeze the affine parameters of every BatchNorm layer for good; running statistics rest in comparison mode."""
    for parameter in norm_parameters(model):
        parameter.requires_grad_(False)


@contextmanager
def frozen(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Within it, some parameters are not trainable; afterwards they are again."""
    parameters = list(parameters)
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


@contextmanager
def trainable(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Within it, some parameters are trainable; afterwards those that were not no longer are."""
    at_rest = [parameter for parameter in parameters if not parameter.requires_grad]
    for parameter in at_rest:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in at_rest:
            parameter.requires_grad_(False)


@contextmanager
def hooked(modules: Iterable[nn.Module], hook: Callable[..., Any]) -> Iterator[None]:
    """Within it, a hook is called with what each of some modules gives."""
    handles = [module.register_forward_hook(hook) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _QuietCheckpointing:
    """A layer's function for gradient checkpointing, with the layer's own flag off while it computes.

    transformers checkpoints only in training mode, and some layers (OPT, Falcon) read the same flag for their dropout.
    """

    def __init__(self, layer: nn.Module, checkpoint: Callable[..., Any]) -> None:
        self.layer = layer
        self.checkpoint = checkpoint

    def __call__(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        def quietly(*args: Any, **kwargs: Any) -> Any:
            self.layer.training = False
            try:
                return forward(*args, **kwargs)
            finally:
                self.layer.training = True

        return self.checkpoint(quietly, *args, **kwargs)


def set_comparison_mode(model: nn.Module) -> None:
    """Switch off everything random or running (dropout, stochastic depth, BatchNorm statistics).

    The patched model is compared with itself, so both sides must be the same function. Only the flag that gradient
    checkpointing reads stays on where it is enabled, because transformers ignores checkpointing in evaluation mode; within
    such a layer it is off.
    """
    _evaluated(model)
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing:
            module.training = True
            if not _is_quiet(module):
                module._gradient_checkpointing_func = _QuietCheckpointing(module, module._gradient_checkpointing_func)


@contextmanager
def comparison_mode(model: nn.Module, checkpointing: bool = True) -> Iterator[None]:
    """[`set_comparison_mode`] for a while: afterwards each module is in the mode that it was in.

    Args:
        model (`torch.nn.Module`): The model.
        checkpointing (`bool`, *optional*, defaults to `True`): Whether activations are checkpointed where that is enabled.
    """
    training = {module: module.training for module in model.modules()}
    quiet = {module for module in model.modules() if _is_quiet(module)}
    if checkpointing:
        set_comparison_mode(model)
    else:
        _evaluated(model)
    try:
        yield
    finally:
        _unquieted(module for module in model.modules() if module not in quiet)
        for module, mode in training.items():
            module.training = mode


@contextmanager
def evaluated_afterwards(model: nn.Module) -> Iterator[None]:
    """Afterwards the whole model is in evaluation mode, and nothing of [`set_comparison_mode`] is left in it."""
    try:
        yield
    finally:
        _unquieted(model.modules())
        _evaluated(model)


def _is_quiet(module: nn.Module) -> bool:
    return isinstance(vars(module).get("_gradient_checkpointing_func"), _QuietCheckpointing)


def _unquieted(modules: Iterable[nn.Module]) -> None:
    """Give layers their own function for gradient checkpointing back."""
    for module in modules:
        if _is_quiet(module):
            module._gradient_checkpointing_func = module._gradient_checkpointing_func.checkpoint


def _evaluated(model: nn.Module) -> None:
    """Evaluation mode, in which some layers (LeViT's) keep what they have computed; going into training mode throws that away."""
    model.train()
    model.eval()
