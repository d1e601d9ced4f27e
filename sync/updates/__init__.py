"""Takes what a fleet signed into use, step by step, and puts the old version back where the new one fails."""
