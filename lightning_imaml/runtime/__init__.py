"""State of PyTorch that a solve sets and restores: precision, attention, random states, phases, memory."""
