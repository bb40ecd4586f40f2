"""One thread for every test here: at this model's size a second one gains nothing, and costs much on a busy machine."""

from collections.abc import Iterator

import pytest

from f2l_vllm.train.steps import one_thread


@pytest.fixture(autouse=True, scope="package")
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield
