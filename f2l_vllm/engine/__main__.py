"""`python -m f2l_vllm.engine serve …`: `vllm serve …`, started with less work."""

import os

from f2l_vllm import collector, logs


def main() -> None:
    """Import what vLLM's command line imports first, and run it."""
    if os.environ.get("VLLM_LOGGING_CONFIG_PATH") == str(logs.CONFIG):
        logs.configure("server")  # vLLM does so after its imports, which have warnings, too
    with collector.paused():
        import vllm.entrypoints.cli.serve  # noqa: F401
        from vllm.entrypoints.cli.main import main
    main()


if __name__ == "__main__":  # processes that vLLM spawns import this module
    main()
