"""The model, assembled by pipeline stage: vision tower, projector, language model."""
