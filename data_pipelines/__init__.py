"""Triples in, batches out."""
