from f2l_vllm import torch_shims

torch_shims.install()
