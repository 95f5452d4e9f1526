"""Prefill and decode in engines of their own: pages go from one to the other as they close."""
