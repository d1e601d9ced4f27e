"""How many files and sockets this process may have open: each connection takes one."""

from __future__ import annotations

import logging
import resource

WANTED = 65_536  # some systems refuse to be asked for "no limit", and none needs more connections here
FEW = 4_096

log = logging.getLogger("lichen.http")


def raise_limit() -> int:
    """Raise the soft limit to the hard one (at most WANTED), and say so in the log where that is little.

    Returns the limit that holds now. A soft limit of 1,024 under a hard one of a million is common.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = WANTED if hard == resource.RLIM_INFINITY else min(hard, WANTED)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            soft = wanted
        except (OSError, ValueError) as error:
            log.warning("The limit on open files stays at %d: %s.", soft, error)
    if soft != resource.RLIM_INFINITY and soft < FEW:
        log.warning(
            "This process may have only %d files open, so that many connections are its limit; "
            "a higher hard limit (ulimit -Hn) allows more.",
            soft,
        )
    return soft
