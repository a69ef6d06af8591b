"""The names of all logged metrics."""

from __future__ import annotations

TRAINING = "train/"
VALIDATION = "val/"
META_GRADIENT = "meta_gradient/"
MEMORY = "memory/"

# Of a meta-step: means over its tasks.
OUTER_LOSS = TRAINING + "outer_loss"
ACCURACY = TRAINING + "accuracy"
ACCURACY_BEFORE = TRAINING + "accuracy_before"
INNER_RESIDUAL = TRAINING + "inner_residual"
LINEAR_RESIDUAL = TRAINING + "linear_residual"
LINEAR_STEPS = TRAINING + "linear_steps"
INDEFINITE = TRAINING + "indefinite"
GRADIENT_NORM = TRAINING + "grad_norm"
LEARNING_RATE = TRAINING + "lr"

# Of an evaluation, each after its stage: the names of configure_metrics beside these.
LOSS = "loss"
EVALUATION_INNER_RESIDUAL = "inner_residual"
EVALUATION_ACCURACY = "accuracy"
BEFORE = "_before"
INTERVAL = "_interval95"

# Of the monitors.
RELATIVE_ERROR = META_GRADIENT + "relative_error"
REFERENCE_CONVERGED = META_GRADIENT + "reference_converged"
REGULARIZER = "regularizer/"
STRENGTH = REGULARIZER + "strength"
STEP_SIZE = "inner_solver/lr"


def of_stage(stage: str, name: str) -> str:
    """The full name of a metric of an evaluation.

    Args:
        stage: "val" or "test".
        name: the metric's own name.
    """
    return f"{stage}/{name}"


def of_loader(loader: int) -> str:
    """What Lightning adds to a name where an evaluation has several dataloaders."""
    return f"/dataloader_idx_{loader}"


def at_steps(stage: str, quantity: str, steps: int) -> str:
    """The name of a quantity after so many inner steps."""
    return of_stage(stage, f"{quantity}_at_{steps}_steps")


def peak_memory(phase: str) -> str:
    """The name of the peak memory of a phase, in MiB."""
    return f"{MEMORY}{phase}_mib"
