"""From a source picture and an instruction to an edited picture."""
