"""Compressed models on disk: folders and Lightning checkpoints."""
