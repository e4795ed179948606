"""`python -m vlm_adapt`: the same entry as `vlm-adapt`."""

import sys

from vlm_adapt.cli import main

sys.exit(main())
