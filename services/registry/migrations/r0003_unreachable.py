"""Whom a node does not reach, and since which view it is there."""

import sqlalchemy as sa
from alembic import op

revision = "r0003"
down_revision = "r0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    there = {column["name"] for column in sa.inspect(op.get_bind()).get_columns("cluster_nodes")}
    # With defaults: the release before this one writes rows without them.
    for column in (
        sa.Column("unreachable", sa.String(4000), nullable=False, server_default=""),
        sa.Column("joined", sa.BigInteger, nullable=False, server_default="0"),
    ):
        if column.name not in there:
            op.add_column("cluster_nodes", column)
