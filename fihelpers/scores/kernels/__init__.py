"""The moments of all weights of a layer at once, in compiled loops (CPU) or in Triton (GPU)."""
