"""The nodes and their changes."""

import sqlalchemy as sa
from alembic import op

from tidings.kit.db import Text

revision = "r0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "cluster_nodes",
        sa.Column("hostname", sa.String(255), primary_key=True),
        sa.Column("secondary", sa.String(255), nullable=False),
        sa.Column("password", sa.String(64), nullable=False),
        sa.Column("last_update", sa.DateTime, nullable=False),
        sa.Column("port", sa.Integer, nullable=False),
        sa.Column("cpu_usage", sa.Float, nullable=False),
        sa.Column("mem_usage", sa.Float, nullable=False),
        sa.Column("address", sa.String(255), nullable=False),
        sa.Column("host", sa.String(255), nullable=False),
        sa.Column("incarnation", Text(64), nullable=False),
        sa.Column("beat", sa.BigInteger, nullable=False),
        sa.Column("services", sa.String(1024), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("version", sa.String(64), nullable=False),
        sa.Column("protocol", sa.Integer, nullable=False),
        sa.Column("virt_hosts", sa.Text, nullable=False),
        sa.Column("strategy", sa.String(255), nullable=False),
        sa.Column("started", sa.DateTime, nullable=False),
        sa.Column("certificate", sa.Text, nullable=False),
        if_not_exists=True,
    )
    op.create_table(
        "cluster_version",
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("version", sa.Integer, nullable=False),
        if_not_exists=True,
    )
    if op.get_bind().execute(sa.text("select count(*) from cluster_version")).scalar() == 0:
        op.execute("insert into cluster_version (id, version) values (1, 0)")
    op.create_table(
        "cluster_changes",
        sa.Column("version", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("hostname", sa.String(255), nullable=False),
        sa.Column("incarnation", Text(64), nullable=False),
        sa.Column("happened", sa.DateTime, nullable=False),
        if_not_exists=True,
    )
