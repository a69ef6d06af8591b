"""The command line: ``lightning-imaml fit | validate | test | predict``, a LightningCLI."""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
import warnings
from typing import Any, NoReturn

from jsonargparse import Namespace
from lightning.pytorch import LightningDataModule, loggers
from lightning.pytorch import callbacks as lightning_callbacks
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_warn

# These imports register the classes, so that configurations can name them without their module.
from lightning_imaml import callbacks, curvature, data, inner, linear, losses, meta_gradients, models, regularizers
from lightning_imaml.module import IMAMLModule
from lightning_imaml.runtime.memory import keep_freed_memory


class Parser(LightningArgumentParser):
    """LightningCLI's parser, whose errors end with the valid name nearest to an unknown one."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # An abbreviated option is a typing error too; jsonargparse before 4.53 accepted it in subcommands.
        super().__init__(*args, **{**kwargs, "allow_abbrev": False})

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Exit with the message and a proposal."""
        super().error(message + self._proposal(message), ex)

    def _proposal(self, message: str) -> str:
        # The text of jsonargparse's message says which name is unknown, and where valid names are found.
        if found := re.search(r"class_path '([\w.]+)':\s+Option '(\w+)' is not accepted", message):
            unknown, valid = found[2], _parameters(_imported(found[1]))
        elif found := re.search(r"module '([\w.]+)' has no attribute '(\w+)'", message):
            unknown, valid = found[2], [name for name in dir(importlib.import_module(found[1])) if name[0] != "_"]
        elif found := re.search(r"Expected a dot import path string: (\w+)", message):
            unknown, valid = found[1], _class_names()
        elif found := re.search(r"(?:unrecognized arguments: --|does not accept option ')([\w.]+)", message):
            unknown, valid = found[1], self._options()
        else:
            return ""
        nearest = difflib.get_close_matches(unknown, valid, n=1)  # It drops names that are not similar.
        return f"\nThe valid name nearest to {unknown!r} is {nearest[0]!r}." if nearest else ""

    def _options(self) -> list[str]:
        """The names of all options, including those of subcommands."""
        names = []
        for action in self._actions:
            names += [option.removeprefix("--") for option in action.option_strings]
            subcommands: dict[str, Any] = getattr(action, "_name_parser_map", None) or {}
            for parser in subcommands.values():
                names += parser._options()
        return [name for name in names if not name.startswith(("-", "print_"))]


def _class_names() -> list[str]:
    """The classes that a configuration may name without their module."""
    own = (callbacks, curvature, data, inner, linear, losses, meta_gradients, models, regularizers)
    names = {
        name
        for family in (*own, lightning_callbacks, loggers)
        for name, value in vars(family).items()
        if inspect.isclass(value)
    }
    return sorted(names | {IMAMLModule.__name__})


def _imported(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def _parameters(called: Any) -> list[str]:
    """The parameters of a function or a class; where it passes ``**options`` on, those of its base classes too."""
    names: list[str] = []
    for kind in called.__mro__ if inspect.isclass(called) else [called]:
        parameters = inspect.signature(kind).parameters.values()
        names += [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return names


# These settings belong to the machine that computes, so the command line's values override the checkpoint's.
_MACHINE_SETTINGS = ("init_args.chunk_size", "init_args.compile")


class CommandLine(LightningCLI):
    """LightningCLI, which warns when a checkpoint's settings of the module override given ones."""

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse the arguments, and keep them as they were given."""
        super().parse_arguments(parser, args)
        self._args = args

    def before_instantiate_classes(self) -> None:
        """Apply given settings of the machine; warn of other given settings, which the checkpoint overrides."""
        if self.subcommand is None or not self.config[self.subcommand].get("ckpt_path"):
            return
        if isinstance(self._args, dict | Namespace):
            given = self.parser.parse_object(self._args, defaults=False)
        else:
            given = self.parser.parse_args(self._args, defaults=False)
        given, used = given[self.subcommand].get("model", {}), self.config[self.subcommand].model
        for name, value in given.items():
            if name in _MACHINE_SETTINGS and name in used:  # The checkpoint's class may not take it.
                used[name] = value
        lost = [
            f"{name}={value!r} (there {used.get(name)!r})" for name, value in given.items() if used.get(name) != value
        ]
        if lost:
            rank_zero_warn(
                f"the checkpoint's own settings of the module replace those given: {', '.join(lost)}. "
                "For other settings with its weights, use IMAMLModule.load_from_checkpoint(PATH, NAME=VALUE) in Python."
            )


def run(args: list[str] | dict[str, Any] | None = None) -> LightningCLI:
    """Run the command line in this process.

    With ``--ckpt_path``, the checkpoint's settings of the module override the command line's, as in any LightningCLI,
    and a warning names the overridden ones. ``chunk_size`` and ``compile`` belong to the machine, so the command line's
    values apply. :class:`~lightning_imaml.checkpoints.AtomicCheckpointIO` writes checkpoints, unless
    ``--trainer.plugins`` names other plugins. To keep what ``predict`` returns, add a
    ``lightning.pytorch.callbacks.BasePredictionWriter``.

    Args:
        args: the arguments of the command line; None takes those of the process.

    Returns:
        The LightningCLI, with its ``trainer``, ``model`` and ``datamodule``.
    """
    # Episodes of data in memory need no workers, so Lightning's advice to add some does not apply.
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    # Scripts pass their own options in ``args`` on purpose.
    warnings.filterwarnings("ignore", message="LightningCLI's args parameter is intended.*")
    return CommandLine(
        IMAMLModule,
        LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        seed_everything_default=0,
        save_config_kwargs={"overwrite": True},
        parser_class=Parser,
        # The module's own arguments optimizer and lr_scheduler stay the only way to set them.
        auto_configure_optimizers=False,
        trainer_defaults={"plugins": [{"class_path": "lightning_imaml.checkpoints.AtomicCheckpointIO"}]},
        args=args,
    )


def main() -> None:
    """Run the ``lightning-imaml`` command."""
    keep_freed_memory()
    run()
