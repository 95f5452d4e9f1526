"""kvkeep.cache."""
