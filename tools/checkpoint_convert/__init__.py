"""Weights between Megatron-Core checkpoints and Hugging Face folders, exact and key by key.

The mapping stands in tables, one module an architecture (`mistral`, `gemma2`, `siglip`, `clip`,
`projector`); Hugging Face parameter names stand nowhere else. No model is built: tensors are read
and written by key, so a conversion needs no GPU and no knowledge of tp or pp.
"""
