"""`python -m rmtkern`."""

import sys

from rmtkern.cli import main

sys.exit(main())
