"""Programs that measure speed, memory and precision."""
