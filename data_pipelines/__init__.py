"""Data: from published edit triples to prepared records, and from records to batches."""
