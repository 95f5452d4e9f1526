"""kvkeep: the KV cache of a language-model server, made to be shared safely."""
