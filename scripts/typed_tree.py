"""Make .build/tree/lichen, the package as it is installed, by copying: what mypy and import-linter read.

The folders of the repository are mapped to `lichen.*` at install time, which these tools cannot see.
"""

from __future__ import annotations

import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TREE = ROOT / ".build" / "tree"
SUBPACKAGES = ("devices", "models", "quant", "runtime", "sync")


def main() -> None:
    """Copy the package afresh, keeping the tools' caches beside it."""
    package = TREE / "lichen"
    shutil.rmtree(package, ignore_errors=True)
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "lichen", package, ignore=ignored)
    for name in SUBPACKAGES:
        shutil.copytree(ROOT / name, package / name, ignore=ignored)


if __name__ == "__main__":
    main()
