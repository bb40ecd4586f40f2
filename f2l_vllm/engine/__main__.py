"""`python -m f2l_vllm.engine serve …`: `vllm serve …`, started with less work."""

from f2l_vllm import collector


def main() -> None:
    """Import what vLLM's command line imports first, and run it."""
    with collector.paused():
        import vllm.entrypoints.cli.serve  # noqa: F401
        from vllm.entrypoints.cli.main import main
    main()


if __name__ == "__main__":  # processes that vLLM spawns import this module
    main()
