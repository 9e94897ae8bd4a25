"""TensorFlow Datasets without its progress bars and its log, in which are routine messages and advice to get OpenCV."""

import logging

import tensorflow_datasets as tfds

__all__ = ["tfds"]


def _is_needed(record: logging.LogRecord) -> bool:
    return "tensorflow_datasets" not in record.pathname or record.levelno >= logging.ERROR


tfds.disable_progress_bar()
logging.getLogger("absl").addFilter(_is_needed)
