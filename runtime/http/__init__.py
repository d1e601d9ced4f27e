"""The HTTP daemon: OpenAI-compatible routes over the engine, and the guard in front of them."""
