"""Continuous batching over a paged, tenant-scoped prefix cache."""
