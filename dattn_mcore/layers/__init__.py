"""The decomposed self-attention and the Megatron-Core layer spec that carries it."""
