"""The pages for whoever changes the code name what is there."""

import re

import pytest
import yaml

from f2l_vllm.settings import Settings
from tests.support import ROOT

PACKAGE = ROOT / "f2l_vllm"
IMPORTS_VLLM = re.compile(r"^ *(from|import) vllm\b", re.MULTILINE)


def named_in(page: str) -> set[str]:
    """Everything between backticks that looks like a path of a module or a test."""
    return set(re.findall(r"`([a-z0-9_/.]+\.py)`", (ROOT / "docs" / page).read_text()))


def test_every_module_that_imports_vllm_is_in_the_ledger_of_patches():
    modules = [path for path in PACKAGE.rglob("*.py") if IMPORTS_VLLM.search(path.read_text())]
    assert len(modules) > 15
    assert {str(path.relative_to(PACKAGE)) for path in modules} <= named_in("patches.md")


@pytest.mark.parametrize("page", ["patches.md", "structure.md"])
def test_pages_name_files_that_are_there(page):
    known = [ROOT, PACKAGE, ROOT / "tests", *(path for path in PACKAGE.rglob("*") if path.is_dir())]
    missing = [name for name in named_in(page) if not any((folder / name).exists() for folder in known)]
    assert missing == []


def test_every_room_is_in_the_picture():
    page = (ROOT / "docs" / "structure.md").read_text()
    rooms = [path.name for path in PACKAGE.iterdir() if path.is_dir() and any(path.glob("*.py"))]
    modules = [path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__"]
    assert [name for name in rooms if f"`{name}/" not in page] == []
    assert [name for name in modules if f"`{name}`" not in page] == []


ROOMS = ["store", "catalog", "cluster", "base_models", "video", "hypernetwork", "models", "synthetic"]


@pytest.mark.parametrize("room", ROOMS)
def test_the_picture_of_a_small_room_names_its_modules(room):
    page = (ROOT / "docs" / "structure.md").read_text()
    rows = [row for row in page.splitlines() if re.match(rf"\| \d \| `{room}/`", row)]
    modules = [path.stem for path in (PACKAGE / room).glob("*.py") if path.stem != "__init__"]
    assert [name for name in modules if not any(f"`{name}`" in row for row in rows)] == []


def test_a_supervisor_waits_as_long_as_a_server_may_take_to_stop():
    services = yaml.safe_load((ROOT / "launch" / "compose.yaml").read_text())["services"]
    waits = [int(service["stop_grace_period"].removesuffix("s")) for service in services.values()]
    assert waits
    assert min(waits) >= Settings.model_fields["shutdown_seconds"].default + 5
