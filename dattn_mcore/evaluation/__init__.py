"""Benchmarks over a Hugging Face model, in the LLaVA form; no Megatron."""
