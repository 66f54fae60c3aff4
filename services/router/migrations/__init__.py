"""Alembic versions of the router's tables. Each can be run again after it was cut off half-way."""
