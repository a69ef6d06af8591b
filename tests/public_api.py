"""The public API as text: every public name with its parameters and their defaults.

Recorded in ``tests/api.txt``. A change of the API changes that file too, so that a review sees it:

    PYTHONPATH=. python tests/public_api.py > tests/api.txt
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Iterator
from types import ModuleType
from typing import Any

MODULES = (
    "lightning_imaml", "lightning_imaml.allocator", "lightning_imaml.callbacks", "lightning_imaml.checkpoints",
    "lightning_imaml.cli", "lightning_imaml.curvature", "lightning_imaml.data", "lightning_imaml.functional",
    "lightning_imaml.inner", "lightning_imaml.linear", "lightning_imaml.losses", "lightning_imaml.meta_gradients",
    "lightning_imaml.metrics", "lightning_imaml.models", "lightning_imaml.problems", "lightning_imaml.regularizers",
)  # fmt: skip

# The names that outside code relies on.
NAMES = {
    "lightning_imaml": ["IMAMLModule", "Episode"],
    "lightning_imaml.inner": ["GradientDescent", "Nesterov", "HessianFree", "TorchOptimizer", "Newton", "Anderson"],
    "lightning_imaml.curvature": ["Hessian", "GaussNewton"],
    "lightning_imaml.linear": ["ConjugateGradient", "Direct", "MinRes", "Neumann", "GMRES", "BiCGStab", "NormalCG"],
    "lightning_imaml.meta_gradients": ["Implicit", "FirstOrder", "Unrolled", "Truncated", "Reptile"],
    "lightning_imaml.problems": ["FixedPoint", "Root", "Equilibrium"],
    "lightning_imaml.regularizers": [
        "NoRegularizer", "Proximal", "MatrixProximal", "FullProximal", "KroneckerProximal", "LowRankProximal",
    ],
    "lightning_imaml.functional": ["adapt", "predict", "evaluate", "meta_gradient", "adapted_network", "solve"],
    "lightning_imaml.callbacks": [
        "MetaGradientErrorMonitor", "PeakMemoryMonitor", "LearningCurve", "ResultsTable",
        "AdaptationCurve", "EpisodeGrid", "RegularizerMonitor",
    ],
    "lightning_imaml.data": [
        "EpisodicDataModule", "GlyphDataModule", "OmniglotDataModule", "MiniImageNetDataModule", "CifarFSDataModule",
        "TieredImageNetDataModule", "CUBDataModule", "ImageFolderDataModule",
        "TasksetDataModule", "SinusoidDataModule", "LinearRegressionDataModule", "PerSample", "RandomAffine",
        "Affine",
    ],
    "lightning_imaml.models": [
        "Conv4", "MLP", "ResNet12", "WideResNet", "SupportNorm", "use_batch_statistics", "use_support_statistics",
        "add_low_rank_adapters", "Checkpointed",
    ],
    "lightning_imaml.allocator": ["keep_freed_memory"],
    "lightning_imaml.checkpoints": ["AtomicCheckpointIO", "export_weights"],
    "lightning_imaml.losses": ["ScaledCrossEntropy"],
    "lightning_imaml.metrics": [
        "EpisodicAccuracy", "EpisodicInterval95", "EpisodicLoss", "EpisodicCalibrationError", "EpisodicMetric",
        "with_intervals",
    ],
}  # fmt: skip


def public(module: ModuleType) -> dict[str, Any]:
    """What a module exports: its ``__all__``, or the functions and classes that it defines."""
    names = getattr(module, "__all__", None) or [
        name
        for name, value in vars(module).items()
        if name[0] != "_" and getattr(value, "__module__", None) == module.__name__ and hasattr(value, "__qualname__")
    ]
    return {name: getattr(module, name) for name in sorted(names)}


def shown(value: Any) -> str:
    """A default without addresses and without what depends on Python's version."""
    if isinstance(value, functools.partial):
        return f"partial({shown(value.func)})"
    if inspect.isroutine(value) or inspect.isclass(value):
        return f"{value.__module__}.{value.__qualname__}"
    return repr(value)


def signature(called: Any) -> str:
    """Parameters, their kinds and their defaults; annotations are mypy's business."""
    found = inspect.signature(called)
    parameters = []
    for parameter in found.parameters.values():
        default = parameter.default
        if default is not parameter.empty:
            text = shown(default)
            default = type("Default", (), {"__repr__": lambda self, text=text: text})()
        parameters.append(parameter.replace(annotation=parameter.empty, default=default))
    return str(found.replace(parameters=parameters, return_annotation=found.empty))


def members(kind: type, listed: set[type]) -> Iterator[str]:
    """Public methods and properties from the package's own classes; those of another listed class stand there."""
    found: dict[str, str] = {}
    for base in kind.__mro__:
        if not base.__module__.startswith("lightning_imaml") or (base is not kind and base in listed):
            continue
        for name, value in vars(base).items():
            if name[0] == "_" or name in found:
                continue
            if isinstance(value, (staticmethod, classmethod)):
                value = value.__func__
            if inspect.isfunction(value):
                found[name] = name + signature(value)
            elif isinstance(value, (property, functools.cached_property)):
                found[name] = name
    yield from (found[name] for name in sorted(found))


def lines() -> Iterator[str]:
    """One line for each public name, and one, indented, for each of its methods and properties."""
    exported = {name: public(importlib.import_module(name)) for name in MODULES}
    listed = {value for names in exported.values() for value in names.values() if inspect.isclass(value)}
    for module, names in exported.items():
        for name, value in names.items():
            called = inspect.isclass(value) or inspect.isroutine(value)
            yield f"{module}.{name}" + (signature(value) if called else "")
            if inspect.isclass(value):
                yield from (f"    .{member}" for member in members(value, listed))


if __name__ == "__main__":
    print("\n".join(lines()))
