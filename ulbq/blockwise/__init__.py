"""A model, one block at a time: the walk over its blocks, and the activations between them."""
