"""Whole, verified, re-shardable checkpoints in Megatron-Core's distributed format."""
