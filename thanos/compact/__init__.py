"""Pruned layers that stay compressed: in memory, and on disk."""
