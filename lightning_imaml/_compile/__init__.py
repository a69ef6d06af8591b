"""PyTorch's compiler, Inductor, behind two functions: run and run_linear."""

from lightning_imaml._compile.door import Tasks, run, run_linear

__all__ = ["Tasks", "run", "run_linear"]
