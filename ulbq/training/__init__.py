"""Training one block, or the whole model, against its full-precision self."""
