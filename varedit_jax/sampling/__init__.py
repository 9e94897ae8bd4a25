"""From a source image and an instruction to an edited image."""
