"""Looks at models from the outside: speed and memory."""
