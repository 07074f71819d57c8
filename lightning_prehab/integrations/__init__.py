"""Bridges to other libraries; none of them is imported before its user has imported it."""
