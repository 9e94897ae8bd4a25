"""Text: instructions to token ids, and token ids to the features that condition the transformer."""
