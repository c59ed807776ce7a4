"""The towers, one file an idea: each knows `config` and other files of this folder only."""
