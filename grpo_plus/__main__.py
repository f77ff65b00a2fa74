"""`python -m grpo_plus`, and with it `accelerate launch -m grpo_plus train ...`."""

import sys

from grpo_plus.cli import main

sys.exit(main())
