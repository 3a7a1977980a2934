"""Grouped-query attention of the dense students."""
