"""Log the peak memory of a training step and of its phases."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils import _pytree as pytree

from lightning_imaml.components import metric_names as names
from lightning_imaml.diagnostics.live_tensors import LiveTensorBytes
from lightning_imaml.diagnostics.nested_peaks import CudaAllocated, NestedPeaks, PeakCounter
from lightning_imaml.runtime import phases
from lightning_imaml.training.schedule import EveryNSteps, record

STEP = "step"
_MIB = 2**20


class PeakMemoryMonitor(Callback):
    """Log the peak memory of a training step and of its phases: figure 2b of the paper (arXiv 1909.04630).

    The monitor logs, in MiB and as the maximum over ranks:

    - ``memory/step_mib``: the whole training batch, whatever module is trained;
    - ``memory/inner_loop_mib``, ``memory/linear_solve_mib``, ``memory/meta_step_mib``: the phases of an
      ``IMAMLModule``, and any other ``lightning_imaml.runtime.phases.phase`` that occurs in the step;
    - ``memory/process_peak_mib``: the process's peak resident size since it started (not on Windows).

    On CUDA, the numbers are what PyTorch's allocator has handed out (``torch.cuda.max_memory_allocated``; a due step
    resets its peak counter). On other devices they are the exact bytes of live tensors: parameters, gradients,
    optimizer state, the batch, and everything that the step makes and autograd keeps. ``LiveTensorBytes`` counts them,
    which makes the due step slower; the other steps cost one comparison. It cannot see into compiled code: with
    ``compile=True`` a due step runs eagerly, and rounds like eager code.

    Args:
        every_n_steps: how often to measure, in optimizer steps.

    Raises:
        ValueError: ``every_n_steps`` is below one.
    """

    def __init__(self, every_n_steps: int = 50) -> None:
        self.every_n_steps = every_n_steps
        self._schedule = EveryNSteps(every_n_steps)
        # These contexts are open while a step is measured, and None otherwise.
        self._measuring: ExitStack | None = None
        self._peaks: NestedPeaks | None = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Begin to measure, if due."""
        self._stop()
        if not self._schedule.due(trainer.global_step):
            return
        with ExitStack() as stack:
            counter: PeakCounter
            if pl_module.device.type == "cuda":
                counter = CudaAllocated(pl_module.device)
            else:
                counter = live = stack.enter_context(LiveTensorBytes())
                live.track(_in_use(trainer, pl_module, batch))
            self._peaks = NestedPeaks(counter)
            stack.enter_context(phases.listening(self._peaks))
            self._peaks.enter(STEP)
            self._measuring = stack.pop_all()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log, if this step was measured."""
        if self._peaks is None:
            return
        peaks = self._peaks
        peaks.exit(STEP)
        self._stop()
        metrics = {names.peak_memory(name): size / _MIB for name, size in peaks.peaks.items()}
        resident = peak_resident_bytes()
        if resident is not None:
            metrics[names.peak_memory("process_peak")] = resident / _MIB
        record(trainer, metrics, reduce_op="max")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop, if a hook skipped the rest of the epoch in the middle of a measured step."""
        self._stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Stop, if the measured step failed."""
        self._stop()

    def _stop(self) -> None:
        measuring, self._measuring, self._peaks = self._measuring, None, None
        if measuring is not None:
            measuring.close()


def _in_use(trainer: Trainer, module: LightningModule, batch: Any) -> Iterator[Tensor]:
    """The tensors that exist when a step begins, which a device's allocator would count too."""
    for parameter in module.parameters():
        yield parameter
        if parameter.grad is not None:
            yield parameter.grad
    yield from module.buffers()
    for optimizer in trainer.optimizers:
        yield from (leaf for leaf in pytree.tree_leaves(list(optimizer.state.values())) if isinstance(leaf, Tensor))
    yield from (leaf for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor))


def peak_resident_bytes() -> int | None:
    """The most physical memory that this process has held since it started, in bytes; None where it is not known."""
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # getrusage(2): KiB on Linux and the BSDs, bytes on macOS.
    return peak if sys.platform == "darwin" else peak * 1024
