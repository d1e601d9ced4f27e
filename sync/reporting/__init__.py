"""Tells a fleet's collector what became of updates on this device: numbers and codes, never words."""
