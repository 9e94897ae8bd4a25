"""Pictures and scores for people."""
