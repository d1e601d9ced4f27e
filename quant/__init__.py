"""Tensor formats: files checked, read and written, and their numbers converted as ggml does."""
