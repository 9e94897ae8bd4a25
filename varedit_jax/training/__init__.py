"""The trainer and what it needs: steps, optimizer, checkpoints, metrics, guards."""
