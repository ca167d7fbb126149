"""Hugging Face: families, files, reading and writing checkpoints."""
