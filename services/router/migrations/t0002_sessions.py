"""Who owns which full JID."""

import sqlalchemy as sa
from alembic import op

from tidings.kit.db import BigInt, JidPart, Text

revision = "t0002"
down_revision = "t0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "sessions",
        sa.Column("host", JidPart, primary_key=True),
        sa.Column("local", JidPart, primary_key=True),
        sa.Column("resource_hash", sa.BINARY(16).with_variant(sa.LargeBinary(16), "sqlite"), primary_key=True),
        sa.Column("resource", JidPart, nullable=False),
        sa.Column("session", Text(64), nullable=False),
        sa.Column("epoch", BigInt, nullable=False),
        sa.Column("router", Text(64), nullable=False),
        sa.Column("available", sa.Boolean, nullable=False),
        if_not_exists=True,
    )
    if not any(index["name"] == "ix_sessions_router" for index in sa.inspect(op.get_bind()).get_indexes("sessions")):
        op.create_index("ix_sessions_router", "sessions", ["router"])
