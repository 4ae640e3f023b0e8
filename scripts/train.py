"""`python scripts/train.py --config config.yaml`: the same as `isdaa train`."""

import sys

from isdaa.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
