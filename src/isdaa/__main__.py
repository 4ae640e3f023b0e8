"""`python -m isdaa`."""

from isdaa.cli import main

raise SystemExit(main())
