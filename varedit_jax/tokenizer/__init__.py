"""Image <-> residual bits."""
