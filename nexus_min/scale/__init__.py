"""Many GPUs: FSDP2, the recipes of the paper, and what they take."""
