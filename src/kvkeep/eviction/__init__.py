"""Forgetting tokens that recent queries ignore."""
