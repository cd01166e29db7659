"""How good a model is: perplexity, fidelity to its full-precision parent, benchmark tasks; and the report."""
