"""The tables of the Frames2LoRA paper (arXiv 2606.04351): its data sets, prompts, figures, and ours beside them."""
