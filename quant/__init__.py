"""Tensor formats: what a model file must look like before anything native touches it."""
