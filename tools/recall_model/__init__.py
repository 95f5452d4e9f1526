"""Two-layer models that recall what stood far back: what forgetting is judged on."""
