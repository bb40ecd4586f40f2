"""vLLM from PyPI on a machine without an accelerator: text, images, video and many LoRA adapters in one batch.

PyPI's vLLM is built for CUDA: it has the Python code of the CPU backend but none of its compiled kernels. This package
is a platform plugin that replaces them with plain PyTorch.

- `plugin`: entry point; decides whether this platform is used at all.
- `platform`: what vLLM asks of a platform; names the classes below.
- `ops`: the few compiled operators the CPU worker calls.
- `attention`: paged attention.
- `linear`: linear layers with packed weights.
- `lora_slots`, `punica`: how adapters lie in memory, and how many of them run in one batch.
- `worker`: worker and model runner; seeded sampling under chunked prefill.
"""
