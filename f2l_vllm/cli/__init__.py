"""The command line, `f2l-vllm`: one module for each command that is more than one call."""
