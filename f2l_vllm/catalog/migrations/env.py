"""Alembic loads this to run the steps: on the connection of `catalog/schema.py`, in its transaction."""

from alembic import context

context.configure(connection=context.config.attributes["connection"])
with context.begin_transaction():
    context.run_migrations()
