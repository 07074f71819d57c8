"""The dense model as teacher of the cut one, on the same inputs, step by step."""
