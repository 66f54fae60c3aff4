"""The tables of the router. Every key begins with host and local part."""

from __future__ import annotations

import sqlalchemy as sa

from tidings.kit.db import BigInt, Blob, JidPart, JidText, Text

metadata = sa.MetaData()


def _account() -> tuple[sa.Column[str], sa.Column[str]]:
    return (
        sa.Column("host", JidPart, primary_key=True),
        sa.Column("local", JidPart, primary_key=True),
    )


accounts = sa.Table(
    "accounts",
    metadata,
    *_account(),
    sa.Column("created_unix_ms", BigInt, nullable=False),
)

account_keys = sa.Table(
    "account_keys",
    metadata,
    *_account(),
    # "SHA-256" and so on: which hash the keys are for.
    sa.Column("hash", Text(16), primary_key=True),
    sa.Column("salt", sa.LargeBinary(64), nullable=False),
    sa.Column("stored_key", sa.LargeBinary(64), nullable=False),
    sa.Column("server_key", sa.LargeBinary(64), nullable=False),
    sa.Column("iterations", sa.Integer, nullable=False),
)

# Values that all routers share, such as the key of made-up salts.
router_values = sa.Table(
    "router_values",
    metadata,
    sa.Column("name", Text(64), primary_key=True),
    sa.Column("content", sa.LargeBinary(255), nullable=False),
)

# The version of each roster.
rosters = sa.Table("rosters", metadata, *_account(), sa.Column("version", BigInt, nullable=False))

roster_items = sa.Table(
    "roster_items",
    metadata,
    *_account(),
    # The contact's hash, because three parts of JIDs do not fit into one key.
    sa.Column("contact_hash", sa.BINARY(16), primary_key=True),
    sa.Column("contact", JidText, nullable=False),
    # The version of the roster with which the item became what it is; removed items stay for who asks
    # what has changed.
    sa.Column("version", BigInt, nullable=False),
    sa.Column("removed", sa.Boolean, nullable=False),
    sa.Column("name", sa.LargeBinary(4096), nullable=False),
    # JSON list.
    sa.Column("contact_groups", Blob, nullable=False),
    sa.Column("subscription", Text(8), nullable=False),
    sa.Column("ask", sa.Boolean, nullable=False),
    sa.Column("pending_in", Blob, nullable=False),
    sa.Column("approved", sa.Boolean, nullable=False),
)

# One table of messages, archive and offline store in one: a row per account and message (see messages.py).
messages = sa.Table(
    "messages",
    metadata,
    *_account(),
    # Grows in commit order within the account.
    sa.Column("position", BigInt, primary_key=True, autoincrement=False),
    # What clients see. It stands for account, origin and number, and so keeps a message from being kept twice.
    sa.Column("id", Text(32), nullable=False),
    # The other side; '' in rows of the release before, for what `from_jid` says.
    sa.Column("peer", Text(3071), nullable=False, server_default=""),
    # Of the peer's bare JID, which does not fit into one key with the account's.
    sa.Column("peer_hash", sa.Integer, nullable=True),
    # The sending session or component, and the number there; NULL where there is none.
    sa.Column("origin", Text(64), nullable=True),
    sa.Column("origin_number", BigInt, nullable=True),
    sa.Column("received_unix_ms", BigInt, nullable=False),
    sa.Column("from_jid", Text(3071), nullable=False),
    sa.Column("stanza", Blob, nullable=False),
    # No session of the account has acknowledged it.
    sa.Column("pending", sa.Boolean, nullable=False),
    sa.Column("archived", sa.Boolean, nullable=False),
    # The session that it was given to; means nothing when that is not in `sessions`.
    sa.Column("holder", Text(64), nullable=False, server_default=""),
    # Written by the release before, read by nobody.
    sa.Column("origin_key", sa.BINARY(32).with_variant(sa.LargeBinary(32), "sqlite"), nullable=True),
    # A row of 300 bytes, 500 in a group, takes 15.5 µs of MariaDB's processor, and 4 more for the first of these, 3.5
    # for the second. Two that one would expect are not here. By time, 3 µs: archive_sql.py says how it does without.
    # Of what is pending, 3 µs, and 9 more for taking the mark off, which doubles that: `settled` below stands for it.
    sa.Index("messages_id", "id", unique=True),
    sa.Index("messages_peer", "host", "local", "peer_hash", "position"),
)

message_positions = sa.Table(
    "message_positions",
    metadata,
    *_account(),
    # The last position given out in the account.
    sa.Column("last", BigInt, nullable=False),
    # No message up to this position is pending.
    sa.Column("settled", BigInt, nullable=False, server_default="0"),
)

# XEP-0441: where an account has set something.
archive_preferences = sa.Table(
    "archive_preferences",
    metadata,
    *_account(),
    # "always", "never" or "roster".
    sa.Column("standard", Text(8), nullable=False),
    # JSON lists.
    sa.Column("always_jids", Blob, nullable=False),
    sa.Column("never_jids", Blob, nullable=False),
)

# Who owns which full JID; see services.router.store.SessionTable.
sessions = sa.Table(
    "sessions",
    metadata,
    *_account(),
    # The resource's hash, because three parts of JIDs do not fit into one key.
    sa.Column("resource_hash", sa.BINARY(16), primary_key=True),
    sa.Column("resource", JidPart, nullable=False),
    sa.Column("session", Text(64), nullable=False),
    sa.Column("epoch", BigInt, nullable=False),
    sa.Column("router", Text(64), nullable=False, index=True),
    sa.Column("available", sa.Boolean, nullable=False),
)

# Whom sessions have sent presence directly (RFC 6121 4.6): who ends a session for a router that is gone tells them.
directed_presence = sa.Table(
    "directed_presence",
    metadata,
    *_account(),
    sa.Column("session", Text(64), primary_key=True),
    # The receiver's hash, because it does not fit into one key with the others.
    sa.Column("receiver_hash", sa.BINARY(16), primary_key=True),
    sa.Column("receiver", Text(3071), nullable=False),
)
