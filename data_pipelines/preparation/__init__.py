"""The stages of `data_pipelines.prepare`, from published files to shards."""
