"""Scripts that run lichen beside its peers; a package only so that they can share code, and never installed."""
