"""``python -m matchdistill``."""

import sys

from matchdistill.cli import main

sys.exit(main())
