"""Settings as plain data that people read and edit, and tables."""
