"""Training data: the order of the examples, and the sources of their pictures and captions."""
