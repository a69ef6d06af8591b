"""Inner problems: what the inner loop solves and the implicit gradient differentiates."""
