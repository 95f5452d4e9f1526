"""kvkeep.quant."""
