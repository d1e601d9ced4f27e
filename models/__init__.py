"""Torch definitions of model families over quantized tensors: for training, distillation and analysis."""
