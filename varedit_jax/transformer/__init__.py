"""Scale-wise causal transformer over source and target tokens."""
