"""Alembic versions of the registry's tables. Each can be run again after it was cut off half-way."""
