"""The training loop: data in, Megatron-Core's schedules, checkpoints and lines out."""
