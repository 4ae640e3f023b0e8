"""`python -m isdaa.cli`, also under torchrun."""

from isdaa.cli.main import main

raise SystemExit(main())
