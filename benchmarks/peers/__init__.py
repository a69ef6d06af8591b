"""The meta-gradient as other code computes it; each is a function of a network, an episode and the settings."""
