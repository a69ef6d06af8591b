"""Parameters as rows [T, D]: layout, names and patterns, positive values, float32 parameters."""
