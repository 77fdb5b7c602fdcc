"""The command `fedhead`, also as `python -m fedhead`."""

from __future__ import annotations

import signal
from typing import NoReturn


def main() -> NoReturn:
    """Run the command; Ctrl-C while it is still being loaded ends it without a word, and without a traceback."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    from fedhead.cli import main as run

    run()


if __name__ == "__main__":
    main()
