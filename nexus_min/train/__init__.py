"""Training: one stage, one loop, for every configuration."""
