"""Closed-form ways to codes: no gradients, no training."""
