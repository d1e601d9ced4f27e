"""Runs models: engine thread, scheduler, KV cache, sampling, chat templates and the HTTP daemon."""
