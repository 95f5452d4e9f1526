// Everything of attention that is compiled once per instruction set, each part after what it uses.

#include "attention_block.inl"
#include "attention_walk.inl"
#include "attention_between.inl"
#include "attention_nest.inl"
