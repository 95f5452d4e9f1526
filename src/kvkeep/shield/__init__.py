"""kvkeep.shield."""
