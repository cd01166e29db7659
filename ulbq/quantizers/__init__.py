"""Trainable stand-ins for one weight matrix. A quantizer knows nothing of files or models."""
