"""Weights on disk: the native format, directories of weights, published names, and reading files safely."""
