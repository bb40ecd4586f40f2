"""A contract with vLLM: what `engine/__main__.py` imports without garbage collection is what its command needs."""

import gc
import inspect
import sys

from vllm.entrypoints.cli import main as command_line

from f2l_vllm.engine import __main__ as start


def test_the_command_line_imports_serving_before_anything_else_of_weight():
    assert "import vllm.entrypoints.cli.serve\n" in inspect.getsource(command_line.main)


def test_serving_is_imported_with_collection_paused_and_run_with_it_on(monkeypatch):
    seen = {}

    class Finder:
        def find_spec(self, name, path=None, target=None):
            if name == "vllm.entrypoints.cli.serve":
                seen["import"] = gc.isenabled()

    monkeypatch.setattr(command_line, "main", lambda: seen.update(run=gc.isenabled()))
    monkeypatch.delitem(sys.modules, "vllm.entrypoints.cli.serve", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
    try:
        start.main()
    finally:
        gc.unfreeze()
    assert seen == {"import": False, "run": True}
