"""Whom sessions have sent presence directly. The release before neither writes nor reads it."""

import sqlalchemy as sa
from alembic import op

from tidings.kit.db import JidPart, Text

revision = "t0004"
down_revision = "t0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "directed_presence",
        sa.Column("host", JidPart, primary_key=True),
        sa.Column("local", JidPart, primary_key=True),
        sa.Column("session", Text(64), primary_key=True),
        sa.Column("receiver_hash", sa.BINARY(16).with_variant(sa.LargeBinary(16), "sqlite"), primary_key=True),
        sa.Column("receiver", Text(3071), nullable=False),
        if_not_exists=True,
    )
