"""Can this machine install lichen? One sentence for what is missing, with the package to install.

Runs on any Python 3, before anything is installed. Usage: preflight.py [--prebuilt]
"""

import os
import shutil
import sys

NEEDED_BYTES = 1500 * 1000 * 1000
PREBUILT = "make demo LICHEN_PREBUILT=1 takes llama.cpp ready-built instead"


def manager():
    """The system's package manager and how to install with it."""
    for name, command in (
        ("apt-get", "apt-get install"),
        ("dnf", "dnf install"),
        ("pacman", "pacman -S"),
        ("brew", "brew install"),
    ):
        if shutil.which(name):
            return name, command
    return "", "install"


def package(what):
    """The package that brings `what`, in the words of this system's package manager."""
    name, command = manager()
    names = {
        "python": {"apt-get": "python3.11 python3.11-venv", "dnf": "python3.11", "pacman": "python"},
        "venv": {"apt-get": "python3-venv"},
        "compiler": {"apt-get": "build-essential", "dnf": "gcc-c++", "pacman": "base-devel", "brew": "gcc"},
    }[what]
    default = {"python": "python@3.11", "venv": "python3-venv", "compiler": "gcc and g++"}[what]
    return f"{command} {names.get(name, default)}"


def missing(prebuilt):
    """The first thing that is missing, as one sentence; None when all is there."""
    if sys.version_info < (3, 11):
        return "lichen needs Python 3.11 or newer, but this is {}.{}: {}".format(
            sys.version_info[0], sys.version_info[1], package("python")
        )
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError:
        return "Python's venv module is missing: {}".format(package("venv"))
    compilers = (("cc", "gcc", "clang"), ("c++", "g++", "clang++"))
    if not prebuilt and not all(any(shutil.which(name) for name in names) for names in compilers):
        return "A C and C++ compiler is needed to build llama.cpp: {} ({})".format(
            package("compiler"), PREBUILT
        )
    free = shutil.disk_usage(os.getcwd()).free
    if free < NEEDED_BYTES:
        return f"About 1.5 GB of disk space are needed here, but {free / 1e9:.1f} GB are free."
    return None


if __name__ == "__main__":
    sentence = missing("--prebuilt" in sys.argv[1:])
    if sentence:
        sys.exit("lichen: " + sentence)
