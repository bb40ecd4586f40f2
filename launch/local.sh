#!/usr/bin/env bash
# One machine, no container: install once, then serve. Flags go to `f2l-vllm serve`, e.g.
#   launch/local.sh HuggingFaceTB/SmolVLM2-500M-Video-Instruct --hypernetwork-workers 2 --api-key "$KEY"
set -euo pipefail
cd "$(dirname "$0")/.."
make setup
exec .venv/bin/f2l-vllm serve "$@"
