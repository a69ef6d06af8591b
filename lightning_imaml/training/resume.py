"""What a checkpoint holds of the outer step, so that a run that was stopped goes on bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn

from lightning_imaml.runtime.random_states import random_states, seed_random_states, set_random_states
from lightning_imaml.training.hooks import OwnParts
from lightning_imaml.training.hyperparameters import DescribedHyperparameters
from lightning_imaml.training.meta_steps import gathering_group
from lightning_imaml.training.ranks import gather


class OuterState(DescribedHyperparameters, OwnParts):
    """The outer step's state besides Lightning's own: the run's seed, and the gradients of an unfinished meta-step.

    Attributes:
        accumulate_meta_batches: batches for one meta-step.
        tasks_of_step: how many tasks the gradients of the unfinished meta-step are the sum of; None while they change.
        resumed_state: what :meth:`outer_state` was in the checkpoint that the run is resumed from.
    """

    accumulate_meta_batches: int
    tasks_of_step: int | None = 0
    resumed_state: dict[str, Any] | None = None
    _seed: int | None = None

    def outer_state(self) -> dict[str, Any]:
        """What a checkpoint must hold, besides Lightning's own, to go on bit for bit: plain tensors and numbers.

        In the middle of a meta-step, every rank's gradients are its own, and rank zero writes those of all.
        """
        state: dict[str, Any] = {"seed": self._seed, "ranks": self.trainer.world_size}
        fitted = self.trainer.state.fn == TrainerFn.FITTING  # Else the unfinished meta-step is another Trainer's.
        if self.tasks_of_step == 0 or self.accumulate_meta_batches == 1 or not fitted:
            return state
        gradients = {name: p.grad.cpu() for name, p in self.named_parameters() if p.grad is not None}
        mine = {"tasks": self.tasks_of_step, "batch": self._batches_done(), "gradients": gradients}
        shares = None if self.tasks_of_step is None else gather(self.trainer, gathering_group(self.trainer), mine)
        if shares is None or len({(share["tasks"], share["batch"]) for share in shares}) > 1:
            rank_zero_warn(
                "all ranks must be between the same batches to save the gradients of an unfinished meta-step; found "
                "that some do not answer, or are elsewhere, as after an error on one rank. The checkpoint is saved "
                "without these gradients: after a resume, this meta-step will have fewer tasks."
            )
            return state
        return state | {"shares": shares}

    def resume_outer_state(self) -> None:
        """Once, at the first training step after a resume: later than what the Trainer itself clears."""
        state, self.resumed_state = self.resumed_state, None
        if state is None or "shares" not in state or state["ranks"] != self.trainer.world_size:
            return
        mine, parameters = state["shares"][self.global_rank], dict(self.named_parameters())
        self.tasks_of_step = mine["tasks"]
        for name, gradient in mine["gradients"].items():
            parameters[name].grad = gradient.to(parameters[name])

    def _batches_done(self) -> int:
        # ``processed``: a batch that failed halfway is counted as ready and is run again on a resume.
        return int(self.trainer.fit_loop.epoch_loop.batch_progress.total.processed)  # type: ignore[attr-defined]

    @contextmanager
    def random_stream(self) -> Iterator[None]:
        """Draw random numbers, of dropout, from a stream that is a function of the run's seed, the rank and the batch.

        So they are the same after a resume, whatever loaders and validation have drawn. The seed of a run is drawn from
        rank zero's global stream.
        """
        outside = random_states(self.device)
        seed_random_states(self.device, self._seed or 0, self.global_rank, self._batches_done())
        try:
            yield
        finally:
            set_random_states(outside, self.device)

    def agree_on_the_seed(self) -> None:
        """At the start of a fit: draw the seed of the run, the same on all ranks, or take the checkpoint's."""
        drawn, processes = int(torch.randint(2**62, ())), self.trainer.world_size
        if self.resumed_state is not None and "seed" not in self.resumed_state:
            rank_zero_warn(
                "a checkpoint must have been saved by this version to go on exactly; found one of an earlier version. "
                "Random numbers, of dropout, are others from here on, and the gradients of an unfinished meta-step are "
                "dropped."
            )
            self.resumed_state = None
        if self.resumed_state is None or self.resumed_state["seed"] is None:  # Saved before a fit began.
            self._seed = drawn if processes == 1 else self.trainer.strategy.broadcast(drawn)
            return
        self._seed = self.resumed_state["seed"]
        if self.resumed_state["ranks"] != processes:
            dropped = ", and the gradients of the unfinished meta-step are dropped"
            rank_zero_warn(
                f"a run must be resumed with the {self.resumed_state['ranks']} processes that it was saved with, to go "
                f"on exactly; found {processes}. Tasks and random numbers are others from here on"
                f"{dropped if 'shares' in self.resumed_state else ''}."
            )
