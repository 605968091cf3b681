"""python -m trainer lists the package's verbs."""

import sys

from runtime.terminal.verbs import main_of

if __name__ == "__main__":
    sys.exit(main_of("trainer"))
