"""Label-free training of a cut model toward the dense one."""
