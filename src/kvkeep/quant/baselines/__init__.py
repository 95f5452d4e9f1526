"""Others' ways of storing pages, to measure against; none of them is served."""
