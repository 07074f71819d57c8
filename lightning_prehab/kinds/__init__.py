"""Kinds of layers: how each shows its weight matrices, and what takes its place. One file per kind."""
