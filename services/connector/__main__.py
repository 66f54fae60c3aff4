import sys

from tidings.cli import main

sys.exit(main(["run", "connector", *sys.argv[1:]]))
