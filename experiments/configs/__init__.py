"""Experiment cards, one a run."""
