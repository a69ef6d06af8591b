"""PyTorch's compiler, Inductor, behind two functions: run and run_linear."""
