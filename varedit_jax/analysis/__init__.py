"""Models from the outside: speed, memory, precision, parity with golden data, and steps compiled ahead of time."""
