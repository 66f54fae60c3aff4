import sys

from tidings.cli import main

sys.exit(main(["run", "registry", *sys.argv[1:]]))
