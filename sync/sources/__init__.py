"""Model sources, one file a scheme: where the bytes of a model come from."""
