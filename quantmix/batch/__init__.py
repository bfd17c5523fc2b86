"""Pipelines: many models × budgets × steps, content-addressed and resumable."""
