"""`python -m f2l_vllm.video.inspect PATH LIMITS`: probe and check a file of unknown origin in a process of its own.

A damaged file can crash or hang a demuxer; here it only harms this short-lived process, which limits its own memory and
CPU time before it touches the file. Prints one JSON object: the probed header, or `code` and `message`.
"""

from __future__ import annotations

import json
import resource
import sys
from dataclasses import asdict

MEMORY_BYTES = 4 << 30
CPU_SECONDS = 20


def main(path: str, limits: str) -> None:
    """Inspect one file; `limits` is a JSON object of `Limits` fields."""
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))

    from f2l_vllm.video.errors import VideoError
    from f2l_vllm.video.probe import Limits, check_file

    try:
        answer = asdict(check_file(path, Limits(**json.loads(limits))))
    except VideoError as error:
        answer = {"code": error.code, "message": str(error)}
    sys.stdout.write(json.dumps(answer))


if __name__ == "__main__":
    main(*sys.argv[1:])
