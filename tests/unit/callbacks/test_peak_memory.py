"""The memory monitor in plain Lightning training, and its CUDA branch against a recorded allocator."""

import csv
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import CSVLogger
from torch.utils._python_dispatch import _get_current_dispatch_mode

from lightning_imaml.callbacks import PeakMemoryMonitor
from lightning_imaml.callbacks.peak_memory import peak_resident_bytes
from lightning_imaml.diagnostics.nested_peaks import MONITOR, CudaAllocated, NestedPeaks
from lightning_imaml.runtime import phases
from lightning_imaml.training.schedule import EveryNSteps

MIB = 2**20


def trainer_with(tmp_path, *callbacks, logger=False, **kwargs):
    return Trainer(
        **{"max_steps": 4, "limit_val_batches": 0, **kwargs},
        accelerator="cpu",
        default_root_dir=tmp_path,
        logger=logger,
        callbacks=list(callbacks),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


class Hungry(BoringModel):
    """Takes ``inner`` MiB in the inner loop, ``solve`` MiB in the linear solve and 3 MiB around them."""

    def training_step(self, batch, batch_idx):
        with phases.phase(phases.META_STEP):
            kept = torch.zeros(3 * MIB // 4)
            with phases.phase(phases.INNER_LOOP):
                torch.zeros(8 * MIB // 4)
            with phases.phase(phases.LINEAR_SOLVE):
                torch.zeros(2 * MIB // 4)
            del kept
        return super().training_step(batch, batch_idx)


class Metrics(Callback):
    """Remembers ``callback_metrics`` of every step."""

    def __init__(self):
        self.steps = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.steps.append({k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("memory/")})


def test_the_peaks_of_phases_are_their_own(tmp_path):
    seen = Metrics()
    trainer_with(tmp_path, PeakMemoryMonitor(every_n_steps=1), seen, max_steps=2).fit(Hungry())
    for step in seen.steps:
        # A few hundred bytes of parameters and batch come on top.
        assert step["memory/inner_loop_mib"] == pytest.approx(11, abs=0.01)
        assert step["memory/linear_solve_mib"] == pytest.approx(5, abs=0.01)
        assert step["memory/meta_step_mib"] == pytest.approx(11, abs=0.01)
        assert step["memory/step_mib"] == pytest.approx(11, abs=0.01)


def test_any_module_is_measured_as_a_whole_step(tmp_path):
    seen = Metrics()
    model = BoringModel()
    trainer_with(tmp_path, PeakMemoryMonitor(every_n_steps=1), seen).fit(model)
    assert set(seen.steps[0]) == {"memory/step_mib", "memory/process_peak_mib"}
    at_least = sum(p.numel() * 4 for p in model.parameters()) * 2 + 32 * 4
    assert all(at_least <= step["memory/step_mib"] * MIB < 10 * at_least for step in seen.steps)
    # The same work takes the same bytes, every step.
    assert seen.steps[1]["memory/step_mib"] == seen.steps[2]["memory/step_mib"]


def test_it_measures_at_multiples_of_the_interval_and_is_off_between(tmp_path):
    modes, measured = [], []

    class Watch(BoringModel):
        def training_step(self, batch, batch_idx):
            modes.append(_get_current_dispatch_mode() is not None)
            return super().training_step(batch, batch_idx)

        def on_train_batch_end(self, *args):
            assert _get_current_dispatch_mode() is None
            assert phases._listeners == []
            measured.append("memory/step_mib" in self.trainer.callback_metrics)

    trainer_with(tmp_path, PeakMemoryMonitor(every_n_steps=3), max_steps=7).fit(Watch())
    assert modes == [False, False, True, False, False, True, False]
    assert measured == [False, False, True, True, True, True, True]


def test_loggers_get_the_number_once_at_its_step(tmp_path):
    logger = CSVLogger(tmp_path)
    # log_every_n_steps falls on other steps than the monitor.
    trainer_with(tmp_path, PeakMemoryMonitor(every_n_steps=2), logger=logger, log_every_n_steps=3, max_steps=6).fit(
        BoringModel()
    )
    with (Path(logger.log_dir) / "metrics.csv").open(newline="") as file:
        assert [row["step"] for row in csv.DictReader(file) if row["memory/step_mib"]] == ["1", "3", "5"]


def test_training_is_the_same_with_and_without(tmp_path):
    def weights(*callbacks):
        torch.manual_seed(0)
        model = BoringModel()
        trainer_with(tmp_path, *callbacks).fit(model)
        return model.state_dict()

    expected, found = weights(), weights(PeakMemoryMonitor(every_n_steps=1))
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_an_exception_leaves_nothing_behind(tmp_path):
    class Failing(BoringModel):
        def training_step(self, batch, batch_idx):
            assert _get_current_dispatch_mode() is not None
            with phases.phase(phases.INNER_LOOP):
                raise RuntimeError("expected")

    with pytest.raises(RuntimeError, match="expected"):
        trainer_with(tmp_path, PeakMemoryMonitor(every_n_steps=1)).fit(Failing())
    assert _get_current_dispatch_mode() is None
    assert phases._listeners == []


def test_a_skipped_epoch_leaves_nothing_behind(tmp_path):
    class Skipping(BoringModel):
        def on_train_batch_start(self, batch, batch_idx):
            return -1 if batch_idx == 1 else None

    trainer_with(tmp_path, PeakMemoryMonitor(every_n_steps=1), max_steps=-1, max_epochs=1).fit(Skipping())
    assert _get_current_dispatch_mode() is None
    assert phases._listeners == []


def test_an_interval_below_one_is_refused():
    with pytest.raises(ValueError, match="every_n_steps must be at least 1; found 0"):
        PeakMemoryMonitor(every_n_steps=0)


@pytest.mark.parametrize(("increment", "due"), [(1, [2, 5, 8]), (2, [2, 6, 8])])
def test_the_schedule_is_due_once_an_interval(increment, due):
    schedule = EveryNSteps(3)
    assert [step for step in range(0, 10, increment) if schedule.due(step)] == due


def test_the_schedule_counts_batches_of_one_accumulated_step_once():
    schedule = EveryNSteps(2)
    assert [schedule.due(step) for step in (0, 0, 1, 1, 2, 2, 3, 3)] == [False, False, True, False] * 2


class Allocator:
    """A caching allocator as ``torch.cuda`` shows it."""

    def __init__(self, monkeypatch):
        self.now = self.most = 0
        self.devices = []
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", self.max_memory_allocated)
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", self.reset_peak_memory_stats)

    def take(self, size):
        self.now += size
        self.most = max(self.most, self.now)

    def max_memory_allocated(self, device):
        self.devices.append(device)
        return self.most

    def reset_peak_memory_stats(self, device):
        self.devices.append(device)
        self.most = self.now


@pytest.fixture
def allocator(monkeypatch):
    return Allocator(monkeypatch)


@pytest.fixture
def peaks(allocator):
    return NestedPeaks(CudaAllocated(torch.device("cuda:1")))


def use(allocator, size):
    allocator.take(size)
    allocator.take(-size)


def test_an_outer_peak_before_an_inner_phase_is_not_lost(allocator, peaks):
    peaks.enter("outer")
    use(allocator, 100)
    peaks.enter("inner")
    use(allocator, 10)
    peaks.exit("inner")
    use(allocator, 5)
    peaks.exit("outer")
    assert peaks.peaks == {"outer": 100, "inner": 10}
    assert set(allocator.devices) == {torch.device("cuda:1")}


def test_an_inner_peak_belongs_to_the_outer_phase_too(allocator, peaks):
    peaks.enter("outer")
    allocator.take(7)
    peaks.enter("inner")
    use(allocator, 50)
    peaks.exit("inner")
    peaks.enter("other")
    peaks.exit("other")
    peaks.exit("outer")
    assert peaks.peaks == {"outer": 57, "inner": 57, "other": 7}


def test_what_was_used_before_is_nobodys(allocator, peaks):
    use(allocator, 1000)
    peaks.enter("step")
    peaks.exit("step")
    assert peaks.peaks == {"step": 0}


def test_a_repeated_phase_shows_its_largest_occurrence(allocator, peaks):
    for size in (3, 9, 4):
        peaks.enter("chunk")
        use(allocator, size)
        peaks.exit("chunk")
    assert peaks.peaks == {"chunk": 9}


def test_a_monitor_s_own_work_is_nobodys(allocator, peaks):
    peaks.enter("step")
    use(allocator, 20)
    peaks.enter(MONITOR)
    peaks.enter("inner")
    use(allocator, 900)
    peaks.exit("inner")
    peaks.exit(MONITOR)
    use(allocator, 30)
    peaks.exit("step")
    assert peaks.peaks == {"step": 30}


def test_the_monitor_asks_cuda_for_a_module_on_cuda(allocator, monkeypatch, tmp_path):
    class Elsewhere(BoringModel):
        @property
        def device(self):
            return torch.device("cuda:0")

        def training_step(self, batch, batch_idx):
            assert _get_current_dispatch_mode() is None
            with phases.phase(phases.INNER_LOOP):
                use(allocator, 6 * MIB)
            use(allocator, 9 * MIB)
            return super().training_step(batch, batch_idx)

    seen = Metrics()
    monitor, model = PeakMemoryMonitor(every_n_steps=1), Elsewhere()
    trainer = trainer_with(tmp_path, monitor, seen, max_steps=1)
    trainer.fit(model)
    assert seen.steps[0]["memory/inner_loop_mib"] == 6
    assert seen.steps[0]["memory/step_mib"] == 9


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no getrusage")
@pytest.mark.parametrize(("platform", "factor"), [("linux", 1024), ("darwin", 1)])
def test_the_resident_peak_is_in_bytes(monkeypatch, platform, factor):
    import resource

    monkeypatch.setattr(sys, "platform", platform)
    reported = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert peak_resident_bytes() == pytest.approx(reported * factor, rel=0.2)


def test_windows_has_no_resident_peak(monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    assert peak_resident_bytes() is None
