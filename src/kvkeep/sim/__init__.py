"""A cluster in simulated time, from measured costs of steps."""
