"""kvkeep.eviction."""
