"""Ultra-low-bit (1 to 4 bit) weight quantization of language models."""

__version__ = "0.1.0"
