"""How a stream begins, ends and carries elements on each transport. One file for each."""
