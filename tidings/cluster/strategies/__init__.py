"""The strategies that come with Tidings, one a file."""
