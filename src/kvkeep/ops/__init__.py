"""kvkeep.ops."""
