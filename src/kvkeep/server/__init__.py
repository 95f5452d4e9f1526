"""kvkeep.server."""
