"""`python scripts/evaluate.py --model_path path/to/model`: the same as `isdaa evaluate`."""

import sys

from isdaa.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
