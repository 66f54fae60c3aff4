"""Tidings: a clustered XMPP server."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("tidings")
except PackageNotFoundError:  # a checkout that is not installed
    __version__ = "0+unknown"
