"""The layer or the loss whose second derivative PyTorch lacks."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_imaml.problems.supervised import TaskLoss

_MISSING = re.compile(r"derivative for '?(?:aten::)?(\w+)'? is not implemented")


@contextlib.contextmanager
def named_missing_derivatives(example: Callable[[], TaskLoss]) -> Iterator[None]:
    """Say in an error about a missing derivative which layer or loss lacks it, and what works without.

    Args:
        example: gives the loss of a single task.

    Raises:
        NotImplementedError: in place of PyTorch's own error.
    """
    try:
        yield
    except RuntimeError as error:
        missing = _MISSING.search(str(error))
        if missing is None:
            raise
        operation = missing.group(1)
        raise NotImplementedError(
            f"the backbone and the loss must consist of operations that PyTorch can differentiate twice; found "
            f"{_where(example(), operation)}, whose derivative {operation!r} has no derivative itself. Use the "
            "estimator FirstOrder or Reptile with a solver that takes gradients alone, such as GradientDescent, or "
            "write the operation in terms of others."
        ) from error


def _where(loss: TaskLoss, operation: str) -> str:
    """The layer that computes what the operation is the derivative of, or the loss."""
    finder = _Finder(loss.model.module)
    with contextlib.suppress(Exception), finder.watching(), torch.no_grad():
        outputs = loss.outputs(loss.model.initial().unsqueeze(0))
        finder.place = f"the loss {getattr(loss.loss, '__name__', type(loss.loss).__name__)}"
        loss.from_outputs(outputs)
    derivative = operation.strip("_").replace("_backward", "")
    # The longest: the derivative of embedding_bag begins with embedding, too.
    found = max((name for name in finder.first if derivative.startswith(name)), key=len, default="")
    return finder.first.get(found, f"an operation of {type(loss.model.module).__name__} or of its loss")


class _Finder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes for each operation where it is called first.

    Attributes:
        first: by the names of operations.
        place: where the code is now.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.first: dict[str, str] = {}
        self.place = type(network).__name__
        self._names = {layer: f"{type(layer).__name__} {name!r}" for name, layer in network.named_modules() if name}
        self._outer: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note the operation, and run it."""
        self.first.setdefault(func._schema.name.split("::")[-1].strip("_"), self.place)
        return func(*args, **(kwargs or {}))

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Follow which layer runs."""

        def enter(layer: nn.Module, _: Any) -> None:
            self._outer.append(self.place)
            self.place = self._names.get(layer, self.place)

        def leave(layer: nn.Module, *_: Any) -> None:
            self.place = self._outer.pop()

        hooks = register_module_forward_pre_hook(enter), register_module_forward_hook(leave)
        try:
            with self:
                yield
        finally:
            for hook in hooks:
                hook.remove()
