"""What a run will need and cost, from its configuration alone: no PyTorch, no Megatron-Core."""
