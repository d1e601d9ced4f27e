"""Speculation: guess the next tokens cheaply, check all guesses in one step, and keep what was right."""
