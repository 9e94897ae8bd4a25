"""Programs: each parses flags and calls the library."""

from varedit_jax import starting

starting.guard_imports()
