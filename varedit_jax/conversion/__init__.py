"""Weights in and out: published names, files, directories."""
