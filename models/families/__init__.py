"""One file a model family, found by the name that a GGUF gives as general.architecture."""
