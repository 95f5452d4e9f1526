"""kvkeep.attention."""
