"""The procedural data set `shapes`: scenes, edits, the TFDS builder and the exact judge."""
