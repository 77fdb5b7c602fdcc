"""What a node takes from the server beside Flower's own messages, and how much of anything."""

from __future__ import annotations

from typing import Final

RECIPE: Final = "recipe"
"""The one text of a run that counts; nothing else that a server says of it does."""
LONGEST_RECIPE: Final = 1 << 20  # characters
LARGEST_ANSWER: Final = 1 << 30  # bytes, and of a whole message; a head of 250 million parameters
LARGEST_PART: Final = 4 << 20  # bytes of an object that holds no numbers of an array: names, texts, places
MOST_OBJECTS: Final = 10_000  # that a message consists of; two a tensor, and a few
