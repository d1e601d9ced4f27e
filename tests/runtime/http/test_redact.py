"""What an error tells a client."""

from __future__ import annotations

from pathlib import Path

import pytest

from lichen.runtime.http.redact import without_secrets


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("/home/ann/m/x.gguf is bad.", "x.gguf is bad."),
        ("'C:\\Users\\ann\\x.gguf'", "'x.gguf'"),
        ("file:///home/ann/x.gguf", "file:x.gguf"),
        ("https://u:pw@host/a/b?token=1 refused", "https://host/a/b refused"),
        ("key lk-abcdefghijklmnop and Bearer xyz", "key (hidden) and Bearer (hidden)"),
        (f"{Path.home()}/a b/x", "~/a b/x"),
        ("12 tokens/s, and/or; hf:org/repo/file", "12 tokens/s, and/or; hf:org/repo/file"),
        ("See /health.", "See /health."),
    ],
)
def test_what_an_error_tells_a_client(text: str, told: str) -> None:
    assert without_secrets(text) == told
