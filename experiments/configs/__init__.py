"""Experiment configs, one per run."""
