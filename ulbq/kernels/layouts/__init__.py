"""The orders in which packed matrices lie in memory, one class each."""
