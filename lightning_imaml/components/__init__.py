"""The base of all settings, argument checks and stopping rules."""
