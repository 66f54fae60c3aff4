import sys

from tidings.cli import main

sys.exit(main(["run", "router", *sys.argv[1:]]))
