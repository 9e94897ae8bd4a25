"""The procedural data set `shapes`: scenes, edits of them, the TFDS builder and the exact judge."""
