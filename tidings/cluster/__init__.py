"""The vocabulary of the cluster, pure: nodes, views of them, hashing."""
