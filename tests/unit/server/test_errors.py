import re
from pathlib import Path

import f2l_vllm
from f2l_vllm.settings import Settings
from f2l_vllm.store.errors import AdapterIdsExhausted, CatalogBusy, StoreUnavailable
from f2l_vllm.video.errors import CODES
from tests.support import ROOT

ERRORS_PAGE = ROOT / "docs" / "errors.md"


def rows():
    """The rows of the page's tables: the codes, and what to do."""
    for line in ERRORS_PAGE.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("|") and (codes := re.findall(r"`([a-z0-9_]+)`", cells[0 if "`" in cells[0] else 1])):
            yield codes, cells[-1]


def test_the_errors_page_has_every_code_and_what_to_do():
    raised = {*CODES, AdapterIdsExhausted.code, CatalogBusy.code, StoreUnavailable.code}
    package = Path(f2l_vllm.__file__).parent
    for path in [*(package / "server").rglob("*.py"), *(package / "cluster").rglob("*.py")]:
        raised |= set(re.findall(r'(?:HTTPStatus\.\w+, |bad_request\(\s*)"([a-z_]+)"', path.read_text()))
    assert len(raised) > 40
    assert raised - {code for codes, _ in rows() for code in codes} == set()
    for codes, do in rows():
        assert len(do.split()) > 1 or do.startswith("[look](troubleshooting.md#"), codes


def test_every_entry_of_troubleshooting_is_reached_from_its_codes():
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    entries = {
        heading.replace(", ", "-"): heading.split(", ") for heading in re.findall(r"^### (.+)$", page, re.MULTILINE)
    }
    assert len(entries) > 20
    linked = {}
    for codes, do in rows():
        for anchor in re.findall(r"\(troubleshooting\.md#([a-z0-9_-]+)\)", do):
            linked.setdefault(anchor, set()).update(codes)
    assert {*linked} == {*entries}
    for anchor, codes in entries.items():
        assert set(codes) <= linked[anchor]
    for entry in re.split(r"^### .+$", page, flags=re.MULTILINE)[1:]:
        assert re.search(r"^- ", entry, re.MULTILINE)
    assert set(re.findall(r"F2L_([A-Z_]+)", page)) <= {name.upper() for name in Settings.model_fields}
