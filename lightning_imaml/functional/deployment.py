"""Turn adapted parameters into a plain network."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree

from lightning_imaml.components.checks import require
from lightning_imaml.problems.support_set import SupportLayer, require_support_inputs


def adapted_network(
    model: nn.Module, parameters: Mapping[str, Tensor], *, task: int = 0, support_inputs: Any = None
) -> nn.Module:
    """A plain network that has adapted to one task, to save, export, compile and serve.

    The copy is in evaluation mode, requires no gradients and knows nothing of meta-learning. Layers that normalise by
    the statistics of the support set (:class:`lightning_imaml.models.SupportNorm`) become PyTorch's BatchNorm with
    these statistics in its buffers, so that one sample at a time gives what :func:`predict` gives for all of them.

    Example:
        >>> from lightning_imaml.functional import adapt
        >>> model, inputs, targets = nn.Linear(8, 5), torch.randn(1, 5, 8), torch.arange(5).expand(1, 5)
        >>> network = adapted_network(model, adapt(model, inputs, targets).parameters)
        >>> network(torch.randn(1, 8)).shape
        torch.Size([1, 5])

    Args:
        model: the network that was adapted; it is not changed.
        parameters: ``Adapted.parameters``, name → ``[T, ...]``.
        task: which of the T tasks.
        support_inputs: the inputs that the parameters were adapted to, ``[T, s, ...]``; needed where the network
            normalises by their statistics.

    Returns:
        A network of the dtype of ``parameters``, on their device.

    Raises:
        IndexError: there is no such task.
        ValueError: the support inputs are lacking, or the network has no such parameter.

    Warns:
        UserWarning: the network normalises by the statistics of the batch at hand, so that its outputs for a sample
            depend on the other samples of the batch.
    """
    first = next(iter(parameters.values()))
    if not 0 <= task < len(first):
        raise IndexError(f"task must be from 0 to {len(first) - 1}, the tasks of the parameters; found {task}.")
    with torch.inference_mode(False), torch.no_grad():
        network = copy.deepcopy(model).to(first.device, first.dtype).eval().requires_grad_(False)
        own = dict(network.named_parameters(remove_duplicate=False))
        unknown = [name for name in parameters if name not in own]
        names = f"named as those of {type(model).__name__}"
        require(not unknown, None, "parameters", names, unknown, "Pass the network that was adapted.")
        for name, values in parameters.items():
            own[name].copy_(values[task])
        require_support_inputs(network, support_inputs)
        if support_inputs is not None:
            _freeze_statistics(network, pytree.tree_map(lambda t: _cast(t[task].clone(), first), support_inputs))
    if uses_batch_statistics(network):
        warnings.warn(
            f"a deployed network should treat each sample by itself; found that {type(model).__name__} normalises by "
            "the statistics of the batch at hand (BatchNorm without running statistics), so that an output depends on "
            "the other samples of its batch. Meta-train with norm='support' or use_support_statistics(backbone), or "
            "give it batches like those of the evaluation.",
            stacklevel=2,
        )
    return network


def uses_batch_statistics(network: nn.Module) -> bool:
    """Whether a BatchNorm layer normalises by the statistics of the batch at hand."""
    return any(isinstance(layer, _BatchNorm) and layer.running_mean is None for layer in network.modules())


def _cast(tensor: Tensor, like: Tensor) -> Tensor:
    return tensor.to(like) if tensor.is_floating_point() else tensor.to(like.device)


def _freeze_statistics(network: nn.Module, support_inputs: Any) -> None:
    """Replace the layers that read the support set by BatchNorm with its statistics, in one pass over it."""
    frozen: dict[nn.Module, nn.Module] = {}

    def freeze(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        if layer in frozen:
            raise ValueError(
                f"each SupportNorm layer must be used once in a forward pass; found one that {type(network).__name__} "
                "uses twice, with other statistics each time. Give each place a layer of its own."
            )
        assert isinstance(layer, SupportLayer)
        frozen[layer] = layer.frozen(*inputs)

    layers = [layer for layer in network.modules() if isinstance(layer, SupportLayer)]
    hooks = [layer.register_forward_pre_hook(freeze) for layer in layers]
    try:
        network(support_inputs)
    finally:
        for hook in hooks:
            hook.remove()
    for module in list(network.modules()):
        for name, layer in module._modules.items():
            if layer in frozen:
                module._modules[name] = frozen[layer].eval().requires_grad_(False)
