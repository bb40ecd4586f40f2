"""The versions of vLLM that this package runs with, and the installed one; docs/vllm-versions.md says what each needs.

`python f2l_vllm/vllm_versions.py 0.33` prints the torch that this version pins, with nothing installed.
"""

from __future__ import annotations

import sys
from functools import cache
from importlib.metadata import version

TORCH = {"0.32": "2.13.0", "0.33": "2.14.0"}
"""The supported versions, oldest first, and what each pins."""


@cache
def installed() -> str:
    """The installed vLLM, by its major and minor version, without loading it.

    Raises:
        ValueError: this package does not run with it.
    """
    found = version("vllm")
    if minor(found) not in TORCH:
        raise ValueError(
            f"vLLM {found} is installed, and f2l-vllm runs with {' and '.join(TORCH)}: "
            f"pip install 'vllm=={list(TORCH)[-1]}.*', or a newer f2l-vllm"
        )
    return minor(found)


def minor(number: str) -> str:
    """`0.33` of `0.33.0`."""
    return ".".join(number.split(".")[:2])


if __name__ == "__main__":
    print(TORCH[minor(sys.argv[1])])
