"""Data: from published edit triples to prepared records, and from records to batches."""

from varedit_jax import starting

starting.guard_imports()
