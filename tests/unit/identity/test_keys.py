from pathlib import Path

import pytest

from segrpc.service.errors import CredentialInvalidError
from segrpc.service.identity.keys import hash_of, new_key, read_keys, toml_of
from segrpc.service.identity.principal import Principal

METHODS = ("Segment", "Refine")


def write(folder: Path, text: str) -> Path:
    file = folder / "keys.toml"
    file.write_text(text, "utf-8")
    return file


def test_a_key_names_its_principal(tmp_path: Path) -> None:
    alice, also_alice, bob = new_key(), new_key(), new_key()
    limits = 'methods = ["Segment"]\nmodels = ["grabcut"]\n'
    text = toml_of("alice", alice) + toml_of("alice", also_alice) + toml_of('b"ö\\b', bob) + limits
    keys = read_keys(write(tmp_path, text), METHODS)
    assert keys.find(alice) == keys.find(also_alice) == Principal("key:alice")
    assert keys.find(bob) == Principal('key:b"ö\\b', frozenset({"Segment"}), frozenset({"grabcut"}))


def test_other_keys_name_nobody(tmp_path: Path) -> None:
    key = new_key()
    keys = read_keys(write(tmp_path, toml_of("alice", key)), METHODS)
    for wrong in ("", "x", key[:-1], key + "x", key.upper(), hash_of(key), new_key()):
        assert keys.find(wrong) is None


def test_the_file_has_nothing_of_the_key() -> None:
    key = new_key()
    assert len(key) > 43  # 32 bytes in base64, and a prefix
    assert key not in toml_of("alice", key)
    assert new_key() != key


def test_an_empty_file_lets_nobody_in(tmp_path: Path) -> None:
    assert len(read_keys(write(tmp_path, ""), METHODS)) == 0


SECRET = "segrpc_pasted-by-mistake"
GOOD = f'principal = "a"\nsha256 = "{"0" * 64}"\n'


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f'[[keys]]\nprincipal = "a"\nsha256 = "{SECRET}"', r"keys\[0\].sha256"),
        ('[[keys]]\nprincipal = "a"', r"keys\[0\].sha256"),
        (f'[[keys]]\nprincipal = ""\nsha256 = "{"0" * 64}"', r"keys\[0\].principal"),
        (f'[[keys]]\n{GOOD}key = "{SECRET}"', r"keys\[0\].key"),
        (f'[[keys]]\n{GOOD}methods = ["Segmemt"]', r"keys\[0\].methods: no method 'Segmemt'"),
        (f'[[keys]]\n{GOOD}models = "grabcut"', r"keys\[0\].models"),
        (f"[[keys]]\n{GOOD}[[keys]]\n{GOOD}", "two have the same sha256"),
        (f"[[keys]\n{SECRET}", "line 1"),
    ],
)
def test_a_file_that_is_wrong_is_not_quoted(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(ValueError, match=expected) as caught:
        read_keys(write(tmp_path, text), METHODS)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("name", ["", "a\nb", "x" * 257, "\x1b[31m"])
def test_names_that_could_forge_a_log_are_refused(name: str) -> None:
    with pytest.raises(CredentialInvalidError):
        toml_of(name, new_key())
