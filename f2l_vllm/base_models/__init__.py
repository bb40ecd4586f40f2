"""The vision-language models whose answers adapters change: a module for each family, and a registry of them.

`spec` says what a family has to tell, `registry` which there are, `shapes` and `text_layers` where adapters attach,
`merging` how a video's tokens become fewer. Nothing here knows of vLLM, whose side is in `engine/base_models`.
"""
