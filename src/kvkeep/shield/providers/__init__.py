"""Where the key that wraps all others lives: a file, the environment, or a service."""
