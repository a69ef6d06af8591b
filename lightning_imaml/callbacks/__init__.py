"""Lightning callbacks for meta-learning; the memory monitor works in any Lightning project."""

from lightning_imaml.callbacks.adaptation_curve import AdaptationCurve
from lightning_imaml.callbacks.episode_grid import EpisodeGrid
from lightning_imaml.callbacks.learning_curve import LearningCurve
from lightning_imaml.callbacks.meta_gradient_error import MetaGradientErrorMonitor
from lightning_imaml.callbacks.peak_memory import PeakMemoryMonitor
from lightning_imaml.callbacks.regularizer_monitor import RegularizerMonitor
from lightning_imaml.callbacks.results_table import ResultsTable
from lightning_imaml.diagnostics.live_tensors import LiveTensorBytes
from lightning_imaml.diagnostics.reference import ExactReference, MetaGradientError

__all__ = [
    "AdaptationCurve",
    "EpisodeGrid",
    "ExactReference",
    "LearningCurve",
    "LiveTensorBytes",
    "MetaGradientError",
    "MetaGradientErrorMonitor",
    "PeakMemoryMonitor",
    "RegularizerMonitor",
    "ResultsTable",
]
