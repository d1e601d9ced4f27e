"""Make .build/tree/lichen, the package as it is installed, from links: what mypy and import-linter read.

The folders of the repository are mapped to `lichen.*` at install time, which these tools cannot see.
"""

from __future__ import annotations

import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TREE = ROOT / ".build" / "tree"
SUBPACKAGES = ("devices", "quant", "runtime", "sync")


def main() -> None:
    """Write the links afresh."""
    shutil.rmtree(TREE, ignore_errors=True)
    package = TREE / "lichen"
    package.mkdir(parents=True)
    for path in (ROOT / "lichen").iterdir():
        if path.name != "__pycache__":
            (package / path.name).symlink_to(path)
    for name in SUBPACKAGES:
        (package / name).symlink_to(ROOT / name)


if __name__ == "__main__":
    main()
