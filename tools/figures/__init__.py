"""Figures of the documentation, drawn from `bench/results/*.json`."""
