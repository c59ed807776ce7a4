"""The toy world: scenes, tasks, stages and scores of the tiny model (see README.md)."""
