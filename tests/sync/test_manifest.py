"""Typed manifests: good, malformed and hostile, for every kind."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from securesystemslib.formats import encode_canonical

from lichen.errors import ManifestError
from lichen.sync.manifest import KINDS, AdapterManifest, custom_of, make_manifest, read_manifest
from tests.sync.hostile_repository import BASE, manifest

RUNNING = "0.3.1.dev0"


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_goes_there_and_back(kind: str) -> None:
    lineage = [{"what": "smollm2-135m", "sha256": BASE}, {"what": "feedback of one user"}]
    custom = manifest(f"{kind}/it", 12, min_lichen="0.3", lineage=lineage)
    read = read_manifest(custom, running=RUNNING)
    assert (read.kind, read.path, read.size, read.licence) == (kind, f"{kind}/it", 12, "Apache-2.0")
    assert read.lineage[0].sha256 == BASE
    assert read_manifest(custom_of(read), running=RUNNING) == read
    assert read_manifest(msgspec.json.decode(msgspec.json.encode(read)), running=RUNNING) == read


def test_what_is_signed_has_no_fractions() -> None:
    """Canonical JSON knows none; a bar of health travels as text."""
    health = {"rate_share": 0.5, "prompts": [{"text": "Hello?", "expects": ["hello"]}]}
    read = read_manifest(manifest("models/it", 1, health=health), running=RUNNING)
    assert read.health is not None
    assert read.health.rate_share == 0.5
    assert encode_canonical(custom_of(read))
    assert read_manifest(custom_of(read), running=RUNNING) == read
    for bad in ("{", "[]", '{"rate_share": -1}', "[" * 100_000):
        with pytest.raises(ManifestError, match="malformed"):
            read_manifest(manifest("models/it", 1, health=bad), running=RUNNING)


def test_unknown_fields_are_ignored_and_none_is_left_out() -> None:
    read = make_manifest(manifest("adapters/it", 1, later="?", rank=None), running=RUNNING)
    assert isinstance(read, AdapterManifest)
    assert read.rank is None


@pytest.mark.parametrize("needs", ["0.3.2", "0.4", "1.0", "0.3.2.dev1", "99999.0"])
def test_a_newer_lichen_is_asked_for_before_anything_else(needs: str) -> None:
    custom = {"kind": "of the future", "min_lichen": needs, "size": "other"}
    with pytest.raises(ManifestError, match=rf"needs lichen {needs} or newer, but this is 0\.3\.1\.dev0"):
        read_manifest(custom, running=RUNNING)


@pytest.mark.parametrize("needs", ["0.1", "0.3", "0.3.1", "0.3.1rc1"])
def test_an_older_lichen_is_enough(needs: str) -> None:
    read_manifest(manifest("models/it", 1, min_lichen=needs), running=RUNNING)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"kind": "viruses"}, "knows no target of kind 'viruses'"),
        ({"kind": None}, "knows no target of kind None"),
        ({"kind": ["models"]}, "knows no target"),
        ({"kind": "x" * 10_000}, "knows no target"),
        ({"min_lichen": "new"}, "which is no version"),
        ({"min_lichen": 3}, "which is no version"),
        ({"min_lichen": "1" * 400 + ".0"}, "which is no version"),
        ({"name": "../../etc/passwd"}, "malformed"),
        ({"name": "a/b"}, "malformed"),
        ({"name": "it\n"}, "malformed"),
        ({"name": ""}, "malformed"),
        ({"size": -1}, "malformed"),
        ({"size": 1 << 60}, "malformed"),
        ({"size": True}, "malformed"),
        ({"size": "12"}, "malformed"),
        ({"licence": ""}, "malformed"),
        ({"licence": "a\x1b[2J"}, "malformed"),
        ({"licence": "x" * 201}, "malformed"),
        ({"base": "B" * 64}, "malformed"),
        ({"base": "b" * 63}, "malformed"),
        ({"base": "b" * 64 + "\n"}, "malformed"),
        ({"rank": 0}, "malformed"),
        ({"lineage": [{"what": "x"}] * 65}, "malformed"),
        ({"lineage": [{"what": "x", "sha256": "no"}]}, "malformed"),
        ({"lineage": "x"}, "malformed"),
    ],
)
def test_a_bad_field_is_named_in_one_sentence(change: dict[str, Any], sentence: str) -> None:
    custom = manifest("adapters/it", 12) | change
    with pytest.raises(ManifestError, match=sentence) as caught:
        read_manifest(custom, running=RUNNING)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_a_missing_field_or_manifest_is_named() -> None:
    without = manifest("adapters/it", 12)
    del without["base"]
    with pytest.raises(ManifestError, match="missing required field `base`"):
        read_manifest(without, running=RUNNING)
    nothings: tuple[object, ...] = (None, [], "models", 3)
    for nothing in nothings:
        with pytest.raises(ManifestError, match="has no manifest"):
            read_manifest(nothing, running=RUNNING)
    with pytest.raises(ManifestError, match="malformed"):
        read_manifest(manifest("mixtures/it", 1, sources=-1), running=RUNNING)
    with pytest.raises(ManifestError, match="malformed"):
        read_manifest(manifest("checkpoints/it", 1, use="anything"), running=RUNNING)


_TEXT = st.text("ab0.-/ é\0\n", max_size=8)
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | _TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_TEXT, inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from(["kind", "name", "size", "min_lichen", "licence", "base"]), _JSON))
def test_any_json_is_a_manifest_or_one_error(change: dict[str, Any]) -> None:
    try:
        read_manifest(manifest("adapters/it", 12) | change, running=RUNNING)
    except ManifestError as error:
        assert str(error)
