"""Decides what of a fleet this machine may believe: a TUF repository's publisher, and its devices."""
