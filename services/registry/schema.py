"""The tables of the registry. `cluster_nodes` is made to be read by hand: `select * from cluster_nodes`."""

from __future__ import annotations

import sqlalchemy as sa

from tidings.kit.db import Text

metadata = sa.MetaData()

cluster_nodes = sa.Table(
    "cluster_nodes",
    metadata,
    sa.Column("hostname", sa.String(255), primary_key=True),
    sa.Column("secondary", sa.String(255), nullable=False, default=""),
    # The fingerprint of the node's certificate: a name for it, and no secret.
    sa.Column("password", sa.String(64), nullable=False, default=""),
    # For people: no program compares it.
    sa.Column("last_update", sa.DateTime, nullable=False),
    sa.Column("port", sa.Integer, nullable=False),
    sa.Column("cpu_usage", sa.Float, nullable=False, default=0.0),
    sa.Column("mem_usage", sa.Float, nullable=False, default=0.0),
    sa.Column("address", sa.String(255), nullable=False),
    sa.Column("host", sa.String(255), nullable=False, default=""),
    sa.Column("incarnation", Text(64), nullable=False, unique=True),
    sa.Column("beat", sa.BigInteger, nullable=False, default=0),
    sa.Column("services", sa.String(1024), nullable=False),
    sa.Column("state", sa.String(16), nullable=False),
    sa.Column("version", sa.String(64), nullable=False, default=""),
    sa.Column("protocol", sa.Integer, nullable=False),
    sa.Column("virt_hosts", sa.Text, nullable=False),
    sa.Column("strategy", sa.String(255), nullable=False, default=""),
    sa.Column("started", sa.DateTime, nullable=False),
    sa.Column("certificate", sa.Text, nullable=False),
    # The view up to which it has cleaned up after nodes that failed.
    sa.Column("cleaned", sa.BigInteger, nullable=False, default=0),
    # Incarnations that it does not reach, by its own word; and the version of the view with which it joined.
    sa.Column("unreachable", sa.String(4000), nullable=False, default=""),
    sa.Column("joined", sa.BigInteger, nullable=False, default=0),
)

# The version of the view. Whoever changes the view raises it in the same transaction and so waits for those
# before: versions are given out in the order of commits, and who has seen one has seen all before it.
cluster_version = sa.Table(
    "cluster_version",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("version", sa.Integer, nullable=False),
)

# Every change of the nodes, by the version that it made.
cluster_changes = sa.Table(
    "cluster_changes",
    metadata,
    sa.Column("version", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("kind", sa.String(16), nullable=False),
    sa.Column("hostname", sa.String(255), nullable=False),
    sa.Column("incarnation", Text(64), nullable=False),
    sa.Column("happened", sa.DateTime, nullable=False),
)
