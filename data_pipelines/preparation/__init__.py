"""From published files to shards, step by step: what `data_pipelines.prepare` runs."""
