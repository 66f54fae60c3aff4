"""No two rows have one incarnation."""

import sqlalchemy as sa
from alembic import op

revision = "r0004"
down_revision = "r0003"
branch_labels = None
depends_on = None

INDEX = "cluster_nodes_incarnation"


def upgrade() -> None:
    if not any(index["name"] == INDEX for index in sa.inspect(op.get_bind()).get_indexes("cluster_nodes")):
        op.create_index(INDEX, "cluster_nodes", ["incarnation"], unique=True)
