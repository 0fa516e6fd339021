"""``python -m jobs <job>``: what a cluster runs from the shipped working directory, with nothing installed."""

import sys

from jobs.cli import main

sys.exit(main())
