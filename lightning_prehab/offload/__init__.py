"""A model on disk that is larger than memory: its blocks are read, run, cut and written one after the other."""
