"""`f2l-vllm bench` and `plan`: what answering costs, by suites, in several arms, on real servers."""
