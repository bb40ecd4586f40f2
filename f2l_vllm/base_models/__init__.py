"""The vision-language models whose answers adapters change: a folder for each family, and a registry of them.

`spec` says what a family has to tell, `registry` which there are, `shapes` and `text_layers` where adapters attach,
`merging` how a video's tokens become fewer, `video_loader` how vLLM decodes videos for any of them.
"""
