"""Any causal language model, from a Hub id, a folder, a GGUF file or an artifact, read block by block."""
