"""`python -m deepzoo.zoo.cli`, for environments without the console script."""

import sys

from deepzoo.zoo.cli import main

sys.exit(main())
