"""The steps between versions of the catalog's tables; `catalog/schema.py` has Alembic run them."""
