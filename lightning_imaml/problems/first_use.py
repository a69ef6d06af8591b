"""The check of a network's structure when it is first used: is it computed as a plain call would compute it?

One task is enough to see whether the network uses the weights that a task gives it, forward and backward, and whether
it carries state from one call to the next; two tasks show whether all at once give what one at a time gives. Wherever
it can, the check computes in float64, and its bounds are far above rounding.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.linalg import vector_norm
from torch.nn.utils.stateless import _reparametrize_module
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _get_current_dispatch_mode

from lightning_imaml.episodes import clone_inference_tensors
from lightning_imaml.problems.isolation import Place, Snapshot
from lightning_imaml.problems.network import FlatModel
from lightning_imaml.problems.vmap import go_in_turn
from lightning_imaml.runtime.precision import default_dtype
from lightning_imaml.runtime.random_states import random_states, set_random_states

# Relative differences that no rounding explains. Where the same kernels run in the same order, there is hardly any;
# tasks at once have others, and where the network insists on float32, kinks may turn a few of its units.
_SAME, _BATCHED = 1e-2, 0.1

# What must be, what is, and what helps.
_WRITTEN = (
    "must not be written to in the forward pass",
    "is",
    "Register it as a parametrization (torch.nn.utils.parametrize), which computes the weight from another one.",
)
_ELSEWHERE = (
    "must be read from the module in every forward pass, where a task puts its own",
    "lies in another place too, such as a list, and is read from there",
    "Read it from the module, or use nn.ParameterList.",
)
_OTHER_GRADIENT = (
    "must have the gradients that a plain call gives",
    "has another one, as where a torch.autograd.Function calls a layer again in its backward pass, when the layer "
    "holds its initial weights instead of a task's",
    "Pass the weights to the Function and call the layer by torch.func.functional_call, or wrap the layer in "
    "lightning_imaml.models.Checkpointed in place of the Function.",
)


def check_network(flat: FlatModel, inputs: Any, support: int = 0, batched: bool = True) -> None:
    """Compare the network over rows with a plain call of it, once for every choice of what adapts.

    Args:
        flat: the network.
        inputs: ``[T, n, ...]``, of which the first two tasks are taken.
        support: how many of the first samples are the support set of the others.
        batched: whether tasks will go at once.

    Raises:
        ValueError: the network cannot be used rightly; the message names the layer and a remedy.
    """
    leaves = pytree.tree_leaves(inputs)
    several = batched and leaves[0].shape[0] > 1
    done = {(flat.layout, flat.shared, support > 0, times) for times in ((1, 2) if several else (1,))}
    # A dispatch mode counts memory or records operations: those of the solve, so that the check is for a later call.
    if done <= flat.traits.checked or _get_current_dispatch_mode() is not None:
        return
    devices = [flat.device] if flat.device.type == "cuda" else []
    tasks = pytree.tree_map(lambda t: t[: 2 if several else 1], inputs)
    with (
        torch.random.fork_rng(devices),
        torch.inference_mode(False),
        torch.enable_grad(),
        flat.isolated(),
    ):
        for precise in (True, False):
            dtype = torch.float64 if precise and flat.device.type != "mps" else flat.dtype
            # What the network itself finds wrong, the solve will find again, and raise.
            with contextlib.suppress(_CannotCompareError), default_dtype(dtype):
                _Check(flat.with_dtype(dtype), clone_inference_tensors(tasks), support).run(several)
                break
    flat.traits.checked |= done


class _CannotCompareError(Exception):
    """The network raised an error of its own."""


class _Check:
    """One comparison in one dtype."""

    def __init__(self, flat: FlatModel, inputs: Any, support: int) -> None:
        self.flat, self.support = flat, support
        self.inputs = flat.cast(inputs)
        self.states = random_states(flat.device)
        with torch.no_grad():
            self.state = {name: t.clone() for name, t in flat.state().items()}
        initial = flat.initial()
        # Elsewhere than the network's own weights, which would hide that they are used in place of a task's. Signs
        # stay, in case that weights must be positive, and no weight is zero, as those of new layers often are.
        tasks = pytree.tree_leaves(self.inputs)[0].shape[0]
        waves = (torch.arange(tasks * initial.numel(), device=flat.device) + 1.0).sin().to(flat.dtype)
        waves = waves.view(tasks, -1)
        self.rows = torch.where(initial == 0, 0.01 * waves.abs(), initial * (1 + 0.3 * waves))

    def run(self, several: bool) -> None:
        """All of it, for one task and, where there are several, for two at once."""
        one = pytree.tree_map(lambda t: t[0], self.inputs)
        outputs, gradients = self.over_rows(one)
        self.against_plain_call(one, outputs, gradients)
        if several:
            self.against_batch()

    def over_rows(self, inputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Outputs and gradients of one task; where the network writes, also from what it has written."""
        flat = self.flat
        row = self.rows[0].clone().requires_grad_()
        own = [p for name, p in flat.module.named_parameters() if name in flat.names]
        before = Snapshot(flat.module, values=False)
        source = {**self.state, **flat.unflatten(row)}
        named = {name: t.clone() for name, t in source.items()}
        given = dict(named)
        with self.trying():
            outputs = _concat(flat.forward(named, inputs, self.support, keep=True))
            # Before the graph goes. A weight that is reached by the module's own one is held elsewhere, too.
            found = torch.autograd.grad(_score(outputs), [row, *own], allow_unused=True)
        # By their values, since writing to ``.data`` leaves no other trace.
        written = [name for name, t in given.items() if named[name] is not t or not _equal(t, source[name])]
        for name, _ in flat.module.named_parameters():
            if name in written:
                raise _problem(flat.module, name, _WRITTEN)
        for name, elsewhere in zip(flat.names, found[1:], strict=True):
            if elsewhere is not None and elsewhere.any():
                raise _problem(flat.module, name, _ELSEWHERE)
        places = [*before.changes(), *((name.rpartition(".")[0], name.rpartition(".")[2]) for name in written)]
        if places:
            self.against_carried_state(named, inputs, outputs.detach(), sorted(set(places)))
        before.restore()
        flat.traits.writes = tuple(sorted({*flat.traits.writes, *places}))
        gradient = torch.zeros_like(row) if found[0] is None else found[0]
        return outputs.detach(), flat.unflatten(gradient)

    def against_carried_state(self, named: dict[str, Tensor], inputs: Any, fresh: Tensor, places: list[Place]) -> None:
        """Refuse a network whose outputs depend on what an earlier call has written."""
        set_random_states(self.states, self.flat.device)
        with self.trying(), torch.no_grad():
            carried = _concat(self.flat.forward(named, inputs, self.support, keep=True))
        if carried.shape != fresh.shape or _apart(carried, fresh) > torch.finfo(self.flat.dtype).eps ** 0.5:
            name, key = places[0]
            layer = self.flat.module.get_submodule(name)
            raise ValueError(
                f"the backbone must not carry state from one call to the next, since its outputs would depend on the "
                f"order of the tasks; found {type(layer).__name__} {name!r}, which writes {key!r} and reads it in the "
                "next call. Put it into evaluation mode, where that stops the writing, or compute the value from the "
                "inputs of the same call."
            )

    def against_plain_call(self, inputs: Any, outputs: Tensor, gradients: dict[str, Tensor]) -> None:
        """Compare with a module that holds the weights while its outputs are differentiated, too."""
        flat = self.flat
        set_random_states(self.states, flat.device)
        named = {name: t.clone() for name, t in self.state.items()}
        weights = {name: t.clone().requires_grad_() for name, t in flat.unflatten(self.rows[0].detach()).items()}
        named |= weights
        named |= {other: named[name] for other, name in flat.layout.tied}
        before = Snapshot(flat.module, values=False)
        try:
            with self.trying(), flat.surroundings(self.support), _reparametrize_module(flat.module, named):
                plain = flat.module(inputs)
                plain = _concat(pytree.tree_map(lambda t: t[self.support :], plain) if self.support else plain)
                # All of it, since a backward pass may also write gradients that the graph does not know of.
                _score(plain).backward()  # type: ignore[no-untyped-call]
        finally:
            before.restore()
        if plain.shape != outputs.shape or not bool(_apart(plain.detach(), outputs) <= _SAME):
            return  # Random numbers of the network's own; a wrong weight shows in the gradients.
        expected = {name: torch.zeros_like(t) if t.grad is None else t.grad for name, t in weights.items()}
        for name in _different(gradients, expected, _SAME):
            raise _problem(flat.module, name, _OTHER_GRADIENT)

    def against_batch(self) -> None:
        """Compare two tasks at once with one after the other; where they differ, tasks go one at a time from now on."""
        flat = self.flat

        def run(rows: Tensor, inputs: Any) -> tuple[Tensor, Tensor]:
            rows = rows.detach().requires_grad_()
            states = random_states(flat.device)
            outputs = _concat(flat(rows, inputs, self.state, self.support), 1)
            if any(not torch.equal(*pair) for pair in zip(states, random_states(flat.device), strict=True)):
                raise _CannotCompareError  # Different random numbers.
            (gradient,) = torch.autograd.grad([_score(task) for task in outputs], rows, materialize_grads=True)
            return outputs.detach(), gradient

        with self.trying():
            outputs, gradient = run(self.rows, self.inputs)
            alone = [
                run(self.rows[k : k + 1], pytree.tree_map(lambda t, k=k: t[k : k + 1], self.inputs)) for k in range(2)
            ]
        expected, slopes = (torch.cat(parts) for parts in zip(*alone, strict=True))
        wrong = [
            name
            for task in range(2)
            for name in _different(flat.unflatten(gradient[task]), flat.unflatten(slopes[task]), _BATCHED)
        ]
        if outputs.shape == expected.shape and _apart(outputs, expected) <= _BATCHED and not wrong:
            return
        go_in_turn(flat.module)
        where = f"its gradient by {wrong[0]}" if wrong else "its outputs"
        warnings.warn(
            f"{type(flat.module).__name__} must give the same for tasks at once and one at a time; found that "
            f"torch.func.vmap changes {where}. Going on one task at a time, which is slower.",
            stacklevel=2,
        )

    @contextlib.contextmanager
    def trying(self) -> Iterator[None]:
        """Leave errors of the network to the solve, which raises them where the user expects them."""
        try:
            yield
        except Exception as error:
            raise _CannotCompareError from error


def _problem(module: nn.Module, name: str, words: tuple[str, str, str]) -> ValueError:
    path, _, parameter = name.rpartition(".")
    requirement, found, remedy = words
    whose = f"{parameter!r} of {type(module.get_submodule(path)).__name__} {path!r}"
    return ValueError(f"the backbone's weights {requirement}; found that {whose} {found}. {remedy}")


def _equal(now: Tensor, before: Tensor) -> bool:
    same = now == before
    return bool((same | (now != now) & (before != before)).all())


def _concat(outputs: Any, dimensions: int = 0) -> Tensor:
    """All floating outputs as one tensor, after that many first dimensions."""
    leaves = [t for t in pytree.tree_leaves(outputs) if isinstance(t, Tensor) and t.is_floating_point()]
    return torch.cat([leaf.flatten(dimensions).contiguous() for leaf in leaves], dim=-1)


def _score(outputs: Tensor) -> Tensor:
    """A number that depends on every output in another way."""
    weights = (torch.arange(outputs.numel(), device=outputs.device) + 1.0).cos().to(outputs.dtype)
    return (outputs.flatten() * weights).sum()


def _apart(found: Tensor, expected: Tensor) -> float:
    """The relative difference; 0 where a number is not finite."""
    difference = vector_norm(found - expected) / vector_norm(expected).clamp(min=torch.finfo(expected.dtype).tiny)
    return float(difference.nan_to_num(nan=0.0, posinf=0.0))


def _different(found: dict[str, Tensor], expected: dict[str, Tensor], bound: float) -> list[str]:
    """The names of gradients that differ by more than a relative bound."""
    floor = 1e-3 * vector_norm(torch.stack([vector_norm(t) for t in expected.values()]))
    return [
        name
        for name, gradient in expected.items()
        if vector_norm(found[name] - gradient) > bound * (vector_norm(gradient) + floor)
    ]
