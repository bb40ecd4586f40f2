"""What tests name of vLLM and find elsewhere in one of the supported versions."""

from f2l_vllm import vllm_versions

if vllm_versions.installed() == "0.32":
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.renderers import chat_utils
else:
    from vllm.entrypoints.common.cli_args import make_arg_parser
    from vllm.entrypoints.common.startup import cli_env_setup
    from vllm.renderers.chat_utils import chat_message as chat_utils

__all__ = ["chat_utils", "cli_env_setup", "make_arg_parser"]
