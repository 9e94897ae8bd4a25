"""Loss, step, loop, checkpoints, ledger."""
