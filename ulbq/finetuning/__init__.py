"""The training of a whole model: losses, what teaches, what trains, and the loop."""
