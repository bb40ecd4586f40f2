"""The figures of the Frames2LoRA paper as data, a YAML file each: which command measures one, with which options."""
