import re
from pathlib import Path

import f2l_vllm
from f2l_vllm.store.errors import AdapterIdsExhausted, CatalogBusy, StoreUnavailable
from f2l_vllm.video.errors import CODES
from tests.support import ROOT

ERRORS_PAGE = ROOT / "docs" / "errors.md"


def test_the_errors_page_has_every_code():
    raised = {*CODES, AdapterIdsExhausted.code, CatalogBusy.code, StoreUnavailable.code}
    package = Path(f2l_vllm.__file__).parent
    for path in [*(package / "server").rglob("*.py"), *(package / "cluster").rglob("*.py")]:
        raised |= set(re.findall(r'(?:HTTPStatus\.\w+, |bad_request\(\s*)"([a-z_]+)"', path.read_text()))
    assert len(raised) > 40
    page = set(re.findall(r"`([a-z_]+)`", ERRORS_PAGE.read_text()))
    assert raised - page == set()
