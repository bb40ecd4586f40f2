"""The command line answers at once: heavy libraries are loaded by the command that needs them."""

import subprocess
import sys

HEAVY = {"torch", "transformers", "vllm", "ray", "scipy", "matplotlib", "numpy", "av", "httpx"}


def test_naming_the_commands_loads_no_heavy_library():
    program = "import sys, f2l_vllm.cli.main; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert not HEAVY & set(loaded.split())
