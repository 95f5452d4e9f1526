"""Planning which tiles each query row reads."""
