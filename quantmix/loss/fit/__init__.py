"""Refits every shipped parameter file from raw tables: `python -m quantmix.loss.fit --help`."""
