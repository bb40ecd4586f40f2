"""`f2l-vllm bench` and `plan`: suites that measure what answering costs, in several arms, on real servers."""
