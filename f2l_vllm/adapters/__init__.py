"""Adapters after they are made: content addresses, PEFT files, the store on disk and the catalog.

`address` names an adapter by what it was made from, `peft_format` reads and checks PEFT files against a base model,
`store` keeps videos and adapters on disk, `catalog` remembers files, adapters and jobs. Nothing here knows of HTTP.
"""
