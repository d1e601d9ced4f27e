"""`lichen fleet` as two people type it: who publishes, and whose machine belongs to the fleet."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

from tests.cli.test_commands import complaint, lichen

PASSPHRASE = {"LICHEN_FLEET_PASSPHRASE": "correct horse"}


def test_a_fleet_from_init_to_verify(tmp_path: Path) -> None:
    """One walk through the real process: publish, enrol, verify, rotate, and what is refused."""
    repository, home, weights = tmp_path / "fleet", tmp_path / "home", tmp_path / "support"
    weights.write_bytes(b"lora")

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return lichen("fleet", *words, home=home, **PASSPHRASE)

    made = json.loads(
        run("init", str(repository), "--mirror", repository.as_uri(), "--name", "moss", "--json").stdout
    )
    assert "in no fleet" in complaint(run("state"))
    publish = ("publish", str(repository), str(weights), "--kind", "adapters", "--licence", "MIT", "--json")
    assert "missing required field `base`" in complaint(run(*publish))
    done = json.loads(run(*publish, "--base", "b" * 64, "--lineage", "feedback").stdout)
    assert done["sha256"] == hashlib.sha256(b"lora").hexdigest()
    assert "does not open" in complaint(
        lichen("fleet", "renew", str(repository), home=home, LICHEN_FLEET_PASSPHRASE="wrong horse")
    )
    enrolled = run("enrol", made["bundle"], "--fingerprint", made["fingerprint"])
    assert "is in the fleet moss" in enrolled.stdout, enrolled.stderr
    verified = run("verify", "adapters/support", "--file", str(weights))
    assert verified.stdout.startswith("Verified: adapters/support, 4 bytes"), verified.stderr
    weights.write_bytes(b"evil")
    assert "is not what the fleet signed" in complaint(
        run("verify", "adapters/support", "--file", str(weights))
    )
    rotated = json.loads(run("keys", "rotate", str(repository), "root", "--lost", "root-2", "--json").stdout)
    assert rotated == {"role": "root", "keys": ["root-4"]}
    assert json.loads(run("verify", "--json").stdout)["root"] == 2
    state = json.loads(run("state", "--json").stdout)
    assert (state["fleet"], state["can_update"], state["versions"]["root"]) == ("moss", True, 2)
    rows = {row["role"]: row for row in json.loads(run("keys", "list", str(repository), "--json").stdout)}
    assert (rows["root"]["threshold"], len(rows)) == (2, 9)


def test_keys_never_lie_among_the_public_files(tmp_path: Path) -> None:
    folder = str(tmp_path / "fleet")
    words = ("init", folder, "--mirror", "https://m.example", "--keys", f"{folder}/keys")
    assert "must not lie in" in complaint(lichen("fleet", *words, home=tmp_path, **PASSPHRASE))
    assert "need a passphrase" in complaint(lichen("fleet", *words[:-2], home=tmp_path))
    assert not (tmp_path / "fleet").exists()


def test_a_daemon_starts_without_what_a_fleet_needs() -> None:
    code = "import sys, lichen.cli, lichen.runtime.http.daemon, lichen.sync.store, lichen.sync.manifest; "
    code += (
        "print(sorted({'tuf', 'securesystemslib', 'cryptography', 'zstandard', 'pyfastcdc', 'fsspec', "
        "'lichen.sync.trust', 'lichen.sync.reporting', 'lichen.sync.collector'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_missing_package_of_the_extra_is_named(tmp_path: Path) -> None:
    """Each of them as if it were not installed; the sentence says what to do."""
    uses = {
        "zstandard": "from lichen.sync.pieces import unpack as use; given = (b'x', 1, 1)",
        "pyfastcdc": "from lichen.sync.publish import publish_file as use; given = (Path(a), Path(b))",
        "fsspec": "from lichen.sync.mirrors import FsspecMirror as use; given = ('file:///tmp',)",
    }
    (tmp_path / "file").write_bytes(bytes(3 << 20))
    for package, use in uses.items():
        code = (
            "import sys; from pathlib import Path; from lichen.errors import FleetError; _, a, b = sys.argv\n"
            f"sys.modules[{package!r}] = None; {use}\ntry: use(*given)\nexcept FleetError as e: print(e)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "file"), str(tmp_path / "out")],
            capture_output=True,
            text=True,
            check=True,
        )
        assert f"need the package {package}" in done.stdout, done.stderr
        assert "pip install 'lichen[fleet]'" in done.stdout
