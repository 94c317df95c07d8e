"""The training loop: data in, Megatron-Core's schedules and optimizer, checkpoints and lines out."""
