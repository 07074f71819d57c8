"""Matrices in, matrices out: nothing here knows of layers or models."""
