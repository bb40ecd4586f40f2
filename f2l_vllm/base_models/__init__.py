"""The vision-language models that adapters are made for: a module for each family, and a registry of the families.

`spec` defines what a family declares, `registry` lists the families, `shapes` and `text_layers` say where adapters
attach, and `merging` and `dropping` reduce a video's tokens. Nothing here knows of vLLM; its side is in
`engine/base_models`.
"""
