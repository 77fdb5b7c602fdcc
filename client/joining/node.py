"""The node process of a joined holder: keeps the connection to the server, passes messages on, opens none of them.

Started by the supervisor as `python -m fedhead.client.joining.node`; settings come over stdin (pipe.py).
"""

from __future__ import annotations

import logging
import os
import sys
from contextlib import suppress
from typing import NoReturn

from fedhead.client.joining import pipe
from fedhead.client.joining.identity import parse_key

log = logging.getLogger("fedhead.client")


def main() -> NoReturn:
    """Be the node until the supervisor ends it, or until Flower's loop ends."""
    settings = pipe.begin()
    pipe.follow(lambda _: None)
    # What a server sends lies in this process first: if memory runs out, it is the one to end, and is started again.
    with suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("500")
    status = 1
    try:
        from fedhead.client.joining.flower import run_node

        run_node(
            server=settings["server"],
            authority=settings["authority"],
            key=parse_key(settings["key"]),
            secret=bytes.fromhex(settings["secret"]),
            told=_told,
            fatal=lambda why: pipe.emit("fatal", why=why),
            listening=lambda port: pipe.emit("listening", port=port),
            arrived=lambda: pipe.emit("arrived"),
        )
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        log.exception("the node process failed")
    finally:
        # Threads that Flower leaves behind must not keep a node alive that does nothing any more.
        logging.shutdown()
        sys.stderr.flush()
        os._exit(status)


def _told(why: str | None) -> None:
    if why is None:
        pipe.emit("online")
    else:
        pipe.emit("offline", why=why)


if __name__ == "__main__":
    main()
