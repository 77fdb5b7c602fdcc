"""Whether the bytes that a holder sent hold nothing but what its ledger charged."""

from __future__ import annotations

import math

from fedhead.common.privacy.ledger.chain import Entry


def check_contents(row: Entry, counted: bool, data: bytes) -> str | None:
    """What is wrong with the stored bytes of a release, or None.

    Parameters
    ----------
    row : Entry
        The reserve that was released.
    counted : bool
        Whether a noised count was charged with it.
    data : bytes
        As `fedhead.common.protocol.pack` made them; their digest was checked before.

    Notes
    -----
    Guarantee: without a fault, the bytes are the head's arrays, the declared weight, the holder's name, the event that
    the row has and, only where a row charges one, a noised count. Not covered: whether the arrays and the count have
    the noise that was charged (the mechanism's audit), and releases whose bytes are no longer kept.
    """
    from fedhead.common import protocol  # torch and Flower, which a ledger without stored bytes doesn't need

    try:
        content = protocol.unpack(data)
        same = protocol.pack(content) == data
        notes = dict(content.config_records[protocol.RELEASE].items())
    except Exception:  # whatever was written there; its digest is right, so that is what was released
        return "released bytes that can't be read: nobody can say what left"
    if not same:
        return "released bytes beyond those that its parts have room for: they were not charged"
    unknown = sorted(set(notes) - {"holder", "event", "correct"})
    if unknown:
        return f"released {ascii(unknown[0])[:40]}, which no row of the ledger charges"
    if notes.get("holder") != row.holder or notes.get("event") != row.event:
        return "released an event or a name that is not the one that was charged"
    if "correct" in notes and not counted:
        return "released a count of correct answers that was not charged: the row of its noised count is missing"
    count = notes.get("correct", 0.0)
    if not isinstance(count, float) or not math.isfinite(count):
        return "released a count that is no number"
    return None
