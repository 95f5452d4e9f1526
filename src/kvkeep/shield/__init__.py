"""Shielded and sealed KV."""
