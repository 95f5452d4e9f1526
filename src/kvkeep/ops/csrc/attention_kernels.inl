// Everything of attention that is compiled once per instruction set, each part after what it uses.

#include "attention_block.inl"
#include "attention_codes.inl"
#include "attention_fused.inl"
#include "attention_rows.inl"
#include "attention_coded.inl"
#include "attention_halves.inl"
#include "attention_walk.inl"
#include "attention_between.inl"
#include "attention_looked.inl"
#include "attention_nest.inl"
