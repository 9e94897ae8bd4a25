"""Images and scores for people."""
