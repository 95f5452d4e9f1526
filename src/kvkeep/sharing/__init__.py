"""kvkeep.sharing."""
