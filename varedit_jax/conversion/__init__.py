"""Weights in and out: published names, files, folders."""
