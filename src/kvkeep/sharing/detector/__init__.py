"""Find what must stay private in a text: rules, then a learned scorer, then context."""
