import sys

from tidings.cli import main

sys.exit(main(["run", "pubsub", *sys.argv[1:]]))
