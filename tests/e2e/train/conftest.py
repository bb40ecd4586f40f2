from tests.unit.train.conftest import _one_thread  # noqa: F401
