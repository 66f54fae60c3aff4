"""Up to which view a node has cleaned up after others."""

import sqlalchemy as sa
from alembic import op

revision = "r0002"
down_revision = "r0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    if not any(column["name"] == "cleaned" for column in sa.inspect(op.get_bind()).get_columns("cluster_nodes")):
        # With a default: the release before this one writes rows without it.
        op.add_column("cluster_nodes", sa.Column("cleaned", sa.BigInteger, nullable=False, server_default="0"))
