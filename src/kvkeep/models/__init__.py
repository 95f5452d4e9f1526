"""kvkeep.models."""
