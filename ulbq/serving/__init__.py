"""A model in memory that goes on from one prompt after another, and answers over HTTP."""
