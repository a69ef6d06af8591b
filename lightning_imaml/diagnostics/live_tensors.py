"""Count the bytes of live tensors exactly, for devices whose allocator does not count."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


class LiveTensorBytes(TorchDispatchMode):
    """Count the bytes of the tensors made in a ``with`` block, from the creation of each storage until it is freed.

    A storage counts once, by the bytes it holds, however many views share it, and as long as anything holds it, the
    autograd graph included. The count does not depend on an allocator or on the machine: two runs of the same code
    give the same number. It includes tensors inside ``torch.func`` transforms and repeated differentiation.

    The count leaves out scratch space that a kernel takes and returns within one operation, storages that existed
    before the block (unless given to ``track``), sparse tensors and the insides of tensor subclasses. With
    ``compile=True`` the code in the block runs eagerly, so the count is that of eager code. Every operation in the
    block takes some microseconds longer.

    Attributes:
        current: the bytes held now.
        peak: the most bytes held since the beginning, or since the last ``reset_peak``.

    Example:
        >>> x = torch.ones(1024)
        >>> with LiveTensorBytes() as live:
        ...     y = (x + 1) * 2
        >>> live.current, live.peak  # y; y and x + 1
        (4096, 8192)
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.current = 0
        self.peak = 0
        # The key is the address of the C++ storage, which stays the same as long as the storage lives.
        self._live: dict[int, tuple[weakref.ref[torch.UntypedStorage], int]] = {}

    def track(self, tensors: Iterable[Tensor]) -> None:
        """Count storages that already exist, such as those of parameters, from now on."""
        for tensor in tensors:
            self._count(tensor, lambda _: True)

    def reset_peak(self) -> None:
        """Start a new peak at the bytes held now."""
        self.peak = self.current

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operation, then count what it returned."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)

        def is_new(address: int) -> bool:
            # A dispatch mode does not see how torch.tensor(...) fills its storage, only lift_fresh afterwards.
            if func is torch.ops.aten.lift_fresh.default:
                return True
            given = (t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor))
            return all(_address(t) != address for t in given)

        for leaf in pytree.tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._count(leaf, is_new)
        return out

    def _count(self, tensor: Tensor, is_new: Callable[[int], bool]) -> None:
        address = _address(tensor)
        if address is None:
            return
        storage = tensor.untyped_storage()
        ref, before = self._live.get(address, (None, 0))
        if ref is None:
            # A view or an in-place result of a tensor from outside the block takes no new memory.
            if not is_new(address):
                return
            # The Python object of a storage lives as long as the storage itself, also where only C++ holds it.
            ref = weakref.ref(storage, lambda _: self._forget(address))
        elif storage.nbytes() == before:
            return
        self._live[address] = (ref, storage.nbytes())
        self.current += storage.nbytes() - before
        self.peak = max(self.peak, self.current)

    def _forget(self, address: int) -> None:
        self.current -= self._live.pop(address)[1]


def _address(tensor: Tensor) -> int | None:
    """The address of the tensor's storage, or None for a tensor without memory of its own."""
    if tensor.layout is not torch.strided or tensor.is_meta or type(tensor).__torch_dispatch__ is not _PLAIN_DISPATCH:
        return None
    return int(tensor.untyped_storage()._cdata)


_PLAIN_DISPATCH = Tensor.__torch_dispatch__
