"""`python -m grpo_plus`, and with it `accelerate launch -m grpo_plus train ...`."""

import sys

from grpo_plus.cli import main
from grpo_plus.cli.own_modules import leave_the_working_directory

leave_the_working_directory()
sys.exit(main())
