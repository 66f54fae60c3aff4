"""One table of messages for archive and offline store, and the preferences of archives.

Rows of the layout before stay, and wait on. They have ids that clients may see, and an empty `peer`, which stands for
their `from_jid`; none of them is archived. The release before can go on writing and reading.
"""

import sqlalchemy as sa
from alembic import op

from tidings.kit.db import BigInt, Blob, JidPart, Text

revision = "t0003"
down_revision = "t0002"
branch_labels = None
depends_on = None

HASH = sa.BINARY(32).with_variant(sa.LargeBinary(32), "sqlite")
OLD = (
    "host, local, position, id, origin, origin_number, received_unix_ms, from_jid, stanza, pending, archived, "
    "origin_key"
)


def _added() -> tuple[sa.Column, ...]:
    # With defaults: the release before writes rows without them.
    return (
        sa.Column("peer", Text(3071), nullable=False, server_default=""),
        sa.Column("peer_hash", sa.Integer, nullable=True),
        sa.Column("holder", Text(64), nullable=False, server_default=""),
    )


def upgrade() -> None:
    if op.get_bind().dialect.name == "sqlite":
        _made_anew()
    else:
        _altered()
    indexes = {index["name"] for index in sa.inspect(op.get_bind()).get_indexes("messages")}
    if "messages_id" not in indexes:
        op.create_index("messages_id", "messages", ["id"], unique=True)
    if "messages_peer" not in indexes:
        op.create_index("messages_peer", "messages", ["host", "local", "peer_hash", "position"])
    if "settled" not in _columns("message_positions"):
        op.add_column("message_positions", sa.Column("settled", BigInt, nullable=False, server_default="0"))
    op.create_table(
        "archive_preferences",
        sa.Column("host", JidPart, primary_key=True),
        sa.Column("local", JidPart, primary_key=True),
        sa.Column("standard", Text(8), nullable=False),
        sa.Column("always_jids", Blob, nullable=False),
        sa.Column("never_jids", Blob, nullable=False),
        if_not_exists=True,
    )


def _columns(table: str) -> set[str]:
    return {column["name"] for column in sa.inspect(op.get_bind()).get_columns(table)}


def _altered() -> None:
    """What keeps a message from being kept twice is its id from now on: an index less to be written."""
    there = _columns("messages")
    for column in _added():
        if column.name not in there:
            op.add_column("messages", column)
    for index in sa.inspect(op.get_bind()).get_indexes("messages"):
        if index["column_names"] == ["origin_key"]:
            op.drop_index(index["name"], "messages")


def _made_anew() -> None:
    """SQLite can't drop what makes a column unique. It does all this in one transaction, or nothing."""
    if "peer" in _columns("messages"):
        return
    op.create_table(
        "messages_new",
        sa.Column("host", JidPart, primary_key=True),
        sa.Column("local", JidPart, primary_key=True),
        sa.Column("position", BigInt, primary_key=True, autoincrement=False),
        sa.Column("id", Text(32), nullable=False),
        sa.Column("origin", Text(64), nullable=True),
        sa.Column("origin_number", BigInt, nullable=True),
        sa.Column("received_unix_ms", BigInt, nullable=False),
        sa.Column("from_jid", Text(3071), nullable=False),
        sa.Column("stanza", Blob, nullable=False),
        sa.Column("pending", sa.Boolean, nullable=False),
        sa.Column("archived", sa.Boolean, nullable=False),
        sa.Column("origin_key", HASH, nullable=True),
        *_added(),
    )
    op.execute(f"insert into messages_new ({OLD}) select {OLD} from messages")  # noqa: S608
    op.drop_table("messages")
    op.rename_table("messages_new", "messages")
