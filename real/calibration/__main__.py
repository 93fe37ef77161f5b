"""``python -m real.calibration --out FILE`` measures this machine; it needs no Hydra."""

import sys

from real.calibration.profile import main

sys.exit(main())
