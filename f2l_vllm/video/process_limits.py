"""What the processes that read untrusted video allow themselves."""

from __future__ import annotations

import math
import os
import resource


def limit_process(memory_bytes: int, nice: int) -> None:
    """Have this much address space at most, write no files, leave no core, and give way to others."""
    os.nice(nice)
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def allow_cpu(seconds: float) -> None:
    """Allow this many CPU seconds from here on; after that SIGXCPU ends the process."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    end = math.ceil(usage.ru_utime + usage.ru_stime + seconds)
    resource.setrlimit(resource.RLIMIT_CPU, (end, resource.getrlimit(resource.RLIMIT_CPU)[1]))
