"""Which layers of a model can be cut, and the forms in which each can be seen as a matrix."""
