"""Weights between Megatron-Core checkpoints and Hugging Face folders, exact and key by key.

Names stand in the tables of `dattn_mcore.architectures`. No model is built: tensors are read and
written by key, so a conversion needs no GPU and no knowledge of tp or pp.
"""
