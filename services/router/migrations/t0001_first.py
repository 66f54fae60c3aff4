"""Accounts, rosters and messages."""

import sqlalchemy as sa
from alembic import op

from tidings.kit.db import BigInt, Blob, JidPart, JidText, Text

revision = "t0001"
down_revision = None
branch_labels = None
depends_on = None


def _account() -> tuple[sa.Column[str], sa.Column[str]]:
    return sa.Column("host", JidPart, primary_key=True), sa.Column("local", JidPart, primary_key=True)


def upgrade() -> None:
    op.create_table("accounts", *_account(), sa.Column("created_unix_ms", BigInt, nullable=False), if_not_exists=True)
    op.create_table(
        "account_keys",
        *_account(),
        sa.Column("hash", Text(16), primary_key=True),
        sa.Column("salt", sa.LargeBinary(64), nullable=False),
        sa.Column("stored_key", sa.LargeBinary(64), nullable=False),
        sa.Column("server_key", sa.LargeBinary(64), nullable=False),
        sa.Column("iterations", sa.Integer, nullable=False),
        if_not_exists=True,
    )
    op.create_table(
        "router_values",
        sa.Column("name", Text(64), primary_key=True),
        sa.Column("content", sa.LargeBinary(255), nullable=False),
        if_not_exists=True,
    )
    op.create_table("rosters", *_account(), sa.Column("version", BigInt, nullable=False), if_not_exists=True)
    op.create_table(
        "roster_items",
        *_account(),
        sa.Column("contact_hash", sa.BINARY(16).with_variant(sa.LargeBinary(16), "sqlite"), primary_key=True),
        sa.Column("contact", JidText, nullable=False),
        sa.Column("version", BigInt, nullable=False),
        sa.Column("removed", sa.Boolean, nullable=False),
        sa.Column("name", sa.LargeBinary(4096), nullable=False),
        sa.Column("contact_groups", Blob, nullable=False),
        sa.Column("subscription", Text(8), nullable=False),
        sa.Column("ask", sa.Boolean, nullable=False),
        sa.Column("pending_in", Blob, nullable=False),
        sa.Column("approved", sa.Boolean, nullable=False),
        if_not_exists=True,
    )
    op.create_table(
        "messages",
        *_account(),
        sa.Column("position", BigInt, primary_key=True, autoincrement=False),
        sa.Column("id", Text(32), nullable=False),
        sa.Column("origin", Text(64), nullable=True),
        sa.Column("origin_number", BigInt, nullable=True),
        sa.Column("received_unix_ms", BigInt, nullable=False),
        sa.Column("from_jid", Text(3071), nullable=False),
        sa.Column("stanza", Blob, nullable=False),
        sa.Column("pending", sa.Boolean, nullable=False),
        sa.Column("archived", sa.Boolean, nullable=False),
        sa.Column("origin_key", sa.BINARY(32).with_variant(sa.LargeBinary(32), "sqlite"), nullable=True, unique=True),
        if_not_exists=True,
    )
    op.create_table("message_positions", *_account(), sa.Column("last", BigInt, nullable=False), if_not_exists=True)
