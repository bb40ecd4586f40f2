"""`f2l-vllm keys`, and which tenants `serve` takes."""

import re

import pytest
from typer.testing import CliRunner

from f2l_vllm.catalog.catalog import Catalog
from f2l_vllm.catalog.keys import key_hash
from f2l_vllm.cli.main import app
from f2l_vllm.settings import CATALOG, Settings
from tests.unit.cli.test_early_checks import no_gpu, said  # noqa: F401  # a fixture


@pytest.fixture
def keys(database_url):
    def run(*words, code=0):
        found = CliRunner().invoke(app, ["keys", *words, "--database-url", database_url])
        assert found.exit_code == code, found.output
        if code == 2:
            assert found.stderr.startswith(f"f2l-vllm keys {words[0]}: ")
            assert len(found.stderr.splitlines()) == 1
        return found.stderr if code else found.stdout

    return run


def test_a_key_is_added_listed_and_revoked_by_any_of_its_names(keys):
    for label in ("laptop", "desk", "spare"):
        (key,) = keys("add", "news", "--label", label).split()  # nothing else on stdout, so that a script can take it
        digits = key_hash(key)[:8]
        assert re.fullmatch(rf"{digits}  news  \d{{4}}-\d\d-\d\d \d\d:\d\d  {label}\n", keys("list"))
        name = {"laptop": key, "desk": digits, "spare": "spare"}[label]
        assert f"{digits} of news is revoked" in keys("revoke", name)
        assert keys("list") == ""


def test_a_name_of_several_keys_or_of_none_revokes_nothing(keys):
    made = [keys("add", tenant, "--label", "laptop").strip() for tenant in ("news", "sport")]
    keys("add", "news")
    listed = keys("list")
    told = keys("revoke", "laptop", code=2)
    for key in made:
        assert key_hash(key)[:16] in told
    for name in ("", "lap", key_hash(made[0])[:7], made[0] + "x", "news"):
        assert "no such key" in keys("revoke", name, code=2)
    assert keys("list") == listed
    keys("revoke", key_hash(made[0])[:16].upper())
    assert "sport" in keys("revoke", "laptop")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["add", ""], "a tenant's name has 1 to 128 printable characters"),
        (["add", "x" * 129], "a tenant's name has 1 to 128 printable characters"),
        (["add", "a\nb"], "a tenant's name has 1 to 128 printable characters"),
        (["add", "news", "--label", "x" * 65], "a label has at most 64 printable characters"),
    ],
)
def test_a_name_that_cannot_be_listed_is_refused(keys, words, sentence):
    assert sentence in keys(*words, code=2)
    assert keys("list") == ""


def test_a_key_may_be_made_before_the_first_server_has_started(tmp_path):
    home = tmp_path / "new" / "home"
    assert "unable to open" in said("keys", "list", "--home", home)
    assert not home.exists()
    said("keys", "add", "news", "--home", home, code=0)
    catalog = Catalog(f"sqlite:///{home / 'catalog.sqlite3'}")
    assert [key.tenant for key in catalog.api_keys()] == ["news"]
    catalog.close()


def test_serve_takes_the_catalogs_keys_or_a_file_that_exists(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "F2L_TENANTS=catalog " in said("serve", "--tenants", "catalog", "--dry-run", code=0)
    assert "either --api-key" in said("serve", "--tenants", "catalog", "--api-key", "x", "--dry-run")
    assert "there is no file ./catalog" in said("serve", "--tenants", "./catalog", "--dry-run")
    (tmp_path / "catalog").write_text('{"news": ["key"]}')
    assert f"F2L_TENANTS={tmp_path / 'catalog'} " in said("serve", "--tenants", "./catalog", "--dry-run", code=0)
    monkeypatch.setenv("F2L_TENANTS", "nothing.json")
    assert "nothing.json cannot be read" in said("serve", "--dry-run")


def test_a_file_of_the_name_catalog_is_told_from_the_catalog(monkeypatch):
    monkeypatch.setenv("F2L_TENANTS", "./catalog")
    assert Settings().tenants != CATALOG
    assert Settings().tenants.name == "catalog"
    monkeypatch.setenv("F2L_TENANTS", "catalog")
    assert Settings().tenants == CATALOG
