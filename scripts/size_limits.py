"""No function over 60 lines, no file over 400, unless its reason stands here."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

MAX_FUNCTION = 60
MAX_FILE = 400
ALLOWED: dict[str, str] = {
    "runtime/native.py": "the only file that may touch llama.cpp: model, context and sampler stay together",
    "runtime/http/route_table.py": "one row a route",
    "lichen/config.py": "most of it is the table of settings, one declaration each",
    "lichen/cli/serve.py:serve": "one flag a line, and three lines of work",
}


def main() -> int:
    """Print what is too long; the number of places is the exit code."""
    tracked = subprocess.run(
        ["git", "ls-files", "*.py"], capture_output=True, text=True, check=True
    ).stdout.split()
    faults = []
    for name in tracked:
        text = Path(name).read_text(encoding="utf-8")
        lines = text.count("\n")
        if lines > MAX_FILE and name not in ALLOWED:
            faults.append(f"{name}: {lines} lines, the limit is {MAX_FILE}")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > MAX_FUNCTION and f"{name}:{node.name}" not in ALLOWED:
                    faults.append(
                        f"{name}:{node.lineno} {node.name}: {length} lines, the limit is {MAX_FUNCTION}"
                    )
    print("\n".join(faults) or "size limits: fine")
    return len(faults)


if __name__ == "__main__":
    sys.exit(main())
