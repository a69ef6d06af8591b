"""Hyper-parameters as loggers and checkpoints take them: plain values."""

from __future__ import annotations

import dataclasses
import inspect
import sys
import types
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any

from lightning.pytorch.core.mixins.hparams_mixin import HyperparametersMixin


def without_configs(value: Any) -> Any:
    """A value in which OmegaConf's containers, those of Hydra, are dicts and lists; else the value itself."""
    omegaconf: Any = sys.modules.get("omegaconf")  # Where nobody has imported it, there is none of its containers.
    if omegaconf is None:
        return value
    if isinstance(value, omegaconf.Container):
        return omegaconf.OmegaConf.to_container(value, resolve=True)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value) if field.init]
        old = {name: getattr(value, name) for name in names}
        new = {name: without_configs(part) for name, part in old.items()}
        changed = {name: part for name, part in new.items() if part is not old[name]}
        return dataclasses.replace(value, **changed) if changed else value
    if type(value) in (list, tuple):
        parts = [without_configs(part) for part in value]
        return value if all(new is part for new, part in zip(parts, value, strict=True)) else type(value)(parts)
    if type(value) is dict:
        new = {name: without_configs(part) for name, part in value.items()}
        return value if all(new[name] is part for name, part in value.items()) else new
    return value


def described(value: Any) -> Any:
    """A value as plain nested values, such as ``{"name": "GradientDescent", "lr": 0.1, "steps": 16}``.

    Settings become dicts with the name of their class, sequences lists, classes and functions their names.
    """
    if isinstance(value, Enum):
        return described(value.value)
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return kind(value)  # Else a subclass.
    if value is None:
        return None
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: described(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {"name": type(value).__name__, **fields}
    if isinstance(value, Mapping):
        return {str(name): described(part) for name, part in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [described(part) for part in value]
    if hasattr(value, "tolist"):  # Tensors, arrays, and numbers of NumPy, which YAML does not know.
        return value.tolist()
    if hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    return str(value)


def _holds_settings(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(map(_holds_settings, value.values()))
    if isinstance(value, (list, tuple)):
        return any(map(_holds_settings, value))
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def _caller() -> types.FrameType | None:
    """The frame of what called the function that calls this."""
    current = inspect.currentframe()
    inner = None if current is None else current.f_back
    return None if inner is None else inner.f_back


class PlainHyperparameters(HyperparametersMixin):
    """Saves hyper-parameters from Hydra as plain values, which a checkpoint may hold."""

    def save_hyperparameters(
        self,
        *args: Any,
        ignore: Sequence[str] | str | None = None,
        frame: types.FrameType | None = None,
        logger: bool = True,
    ) -> None:
        """As Lightning's own, with plain values."""
        frame = frame or _caller()
        super().save_hyperparameters(*map(without_configs, args), ignore=ignore, frame=frame, logger=logger)
        self._replace_hparams({name: without_configs(value) for name, value in self.hparams.items()})

    def _replace_hparams(self, values: dict[str, Any]) -> None:
        self.hparams.update(values)
        if hasattr(self, "_hparams_initial"):
            self._hparams_initial.update({name: values[name] for name in self._hparams_initial})


class DescribedHyperparameters(PlainHyperparameters):
    """Saves settings of ours among the hyper-parameters as :func:`described`, for loggers.

    A checkpoint holds the settings themselves, see :meth:`_restore_settings`.
    """

    _settings: dict[str, Any]

    def save_hyperparameters(
        self,
        *args: Any,
        ignore: Sequence[str] | str | None = None,
        frame: types.FrameType | None = None,
        logger: bool = True,
    ) -> None:
        """As Lightning's own, with plain values."""
        super().save_hyperparameters(*args, ignore=ignore, frame=frame or _caller(), logger=logger)
        found = {name: value for name, value in self.hparams.items() if _holds_settings(value)}
        self._settings = {**getattr(self, "_settings", {}), **found}
        self._replace_hparams(dict(self.hparams) | {name: described(value) for name, value in found.items()})

    def _restore_settings(self, saved: dict[str, Any]) -> None:
        """Put the settings themselves in the place of their descriptions, in a checkpoint's hyper-parameters."""
        for name, value in getattr(self, "_settings", {}).items():
            if saved.get(name) == described(value):  # Else someone has changed it since.
                saved[name] = value
