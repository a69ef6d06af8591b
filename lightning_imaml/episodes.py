"""The episode: a batch of few-shot tasks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


class Episode(NamedTuple):
    """A batch of T tasks, each with a support set to adapt to and a query set to be judged on.

    A named tuple, so that data loaders collate, pin and move it, and Lightning reads its batch size as T.

    Example:
        >>> labels = torch.arange(5).expand(2, 5)  # Two tasks, 5-way 1-shot, with one query a class.
        >>> Episode(torch.randn(2, 5, 8), labels, torch.randn(2, 5, 8), labels).tasks
        2

    Attributes:
        support_inputs: ``[T, N*K, ...]`` for N ways and K shots; a tensor, or a dict, list or tuple of tensors.
        support_targets: ``[T, N*K]`` class indices in ``0 … N-1``, or ``[T, N*K, ...]`` regression targets.
        query_inputs: ``[T, N*Q, ...]``, of the same structure as ``support_inputs``.
        query_targets: ``[T, N*Q]`` or ``[T, N*Q, ...]``.
    """

    support_inputs: Any
    support_targets: Any
    query_inputs: Any
    query_targets: Any

    @classmethod
    def of(cls, batch: Sequence[Any]) -> Episode:
        """Take a data loader's batch, which a collate function may have made a list, for an episode.

        Raises:
            TypeError: it does not have the four parts.
        """
        if not isinstance(batch, (tuple, list)) or len(batch) != len(cls._fields):
            found = f"{len(batch)} parts" if isinstance(batch, (tuple, list)) else type(batch).__name__
            raise TypeError(
                f"a batch must be an Episode of {', '.join(cls._fields)}; found {found}. Use an EpisodicDataModule, or "
                "a data loader whose collate function returns Episode(...)."
            )
        return cls(*batch)

    @property
    def tasks(self) -> int:
        """The number of tasks T."""
        return int(pytree.tree_leaves(self.support_targets)[0].shape[0])

    def split(self, chunk_size: int | None) -> list[Episode]:
        """Cut into episodes of at most ``chunk_size`` tasks, as views; None keeps all tasks together."""
        if chunk_size is None or chunk_size >= self.tasks:
            return [self]
        starts = range(0, self.tasks, chunk_size)
        return [pytree.tree_map(lambda t, s=s: t[s : s + chunk_size], self) for s in starts]

    def take(self, tasks: Tensor) -> Episode:
        """The tasks with these indices, ``[T']``."""
        part: Episode = pytree.tree_map(lambda t: t[tasks], self)
        return part

    def to(self, *args: Any, non_blocking: bool | None = None, **kwargs: Any) -> Episode:
        """Move all tensors to a device; convert those of floating-point numbers to a dtype.

        Example:
            >>> labels = torch.arange(5).expand(2, 5)
            >>> episode = Episode(torch.randn(2, 5, 8), labels, torch.randn(2, 5, 8), labels).to(torch.float64)
            >>> episode.query_inputs.dtype, episode.query_targets.dtype
            (torch.float64, torch.int64)

        Args:
            *args: a device, a dtype, both, or a tensor that has them, as for ``torch.nn.Module.to``.
            non_blocking: whether the copy may still go on when this returns; None as Lightning moves batches, where the
                device can order what follows: on all but CPU and MPS.
            **kwargs: ``device`` and ``dtype`` by name.

        Raises:
            TypeError: the dtype is none of floating-point numbers.
        """
        device, kind, given, _ = torch._C._nn._parse_to(*args, **kwargs)
        dtype: torch.dtype | None = kind
        if dtype is not None and not dtype.is_floating_point:
            if not (args and isinstance(args[0], Tensor)):
                raise TypeError(
                    f"the dtype of an episode must be one of floating-point numbers; found {dtype}. Convert class "
                    "indices with episode._replace(query_targets=...)."
                )
            dtype = None  # A tensor of whole numbers says the device only.
        if non_blocking is None:
            non_blocking = given or (device is not None and device.type not in ("cpu", "mps"))

        def move(leaf: Any) -> Any:
            if isinstance(leaf, Tensor):
                return leaf.to(device, dtype if leaf.is_floating_point() else None, non_blocking=non_blocking)
            return leaf.to(device) if device is not None and callable(getattr(leaf, "to", None)) else leaf

        moved: Episode = pytree.tree_map(move, self)
        return moved

    def validate(self) -> Episode:
        """Check that the four parts describe the same tasks.

        Returns:
            The episode itself.

        Raises:
            TypeError: a part holds something that is not a tensor.
            ValueError: a part is empty, or the parts disagree on the number of tasks or of samples a task.
        """
        samples: dict[str, int] = {}
        tasks: dict[str, int] = {}
        for name, part in self._asdict().items():
            leaves = pytree.tree_leaves(part)
            if not leaves or not all(isinstance(leaf, Tensor) for leaf in leaves):
                kinds = sorted({type(leaf).__name__ for leaf in leaves if not isinstance(leaf, Tensor)})
                raise TypeError(
                    f"Episode.{name} must hold tensors only, at least one; found {', '.join(kinds) or 'nothing'}. "
                    "Convert it with torch.as_tensor, or leave it out of the episode."
                )
            for leaf in leaves:
                if leaf.ndim < 2 or 0 in leaf.shape[:2]:
                    raise ValueError(
                        f"Episode.{name} must have shape [tasks, samples, ...] with at least one of each; "
                        f"found {list(leaf.shape)}. For a single task, add a leading dimension with .unsqueeze(0)."
                    )
                shape = (tasks.setdefault(name, leaf.shape[0]), samples.setdefault(name, leaf.shape[1]))
                if leaf.shape[:2] != shape:
                    raise ValueError(
                        f"the tensors of Episode.{name} must agree on [tasks, samples]; found {list(shape)} and "
                        f"{list(leaf.shape[:2])}. Stack the same samples in all of them."
                    )
        for name, count in tasks.items():
            if count != tasks["support_targets"]:
                raise ValueError(
                    f"Episode.{name} must have the same number of tasks as support_targets "
                    f"({tasks['support_targets']}); found {count}. Stack the same tasks in all four parts."
                )
        for part in ("support", "query"):
            inputs, targets = samples[f"{part}_inputs"], samples[f"{part}_targets"]
            if inputs != targets:
                raise ValueError(
                    f"Episode.{part}_targets must have one target for each {part} input; found {targets} targets for "
                    f"{inputs} inputs a task. Shapes are [tasks, samples, ...] for both."
                )
        return self


def clone_inference_tensors(tree: Any) -> Any:
    """Replace inference-mode tensors, which autograd refuses, by ordinary copies; other tensors stay as they are."""
    return pytree.tree_map_only(torch.Tensor, lambda t: t.clone() if t.is_inference() else t, tree)
