"""Where parts of Flower are used that are not public: in the modules that decision 0013 names, and nowhere else."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PUBLIC = r"(?:app|clientapp|serverapp|serverapp\.strategy|simulation)"
IMPORT = re.compile(rf"^\s*(?:from|import) flwr\.(?!{PUBLIC} import )", re.MULTILINE)


def test_parts_that_are_not_public_are_used_where_the_decision_says():
    found = {
        str(path.relative_to(ROOT))
        for folder in ("client", "common", "server", "simulations")
        for path in (ROOT / folder).rglob("*.py")
        if IMPORT.search(path.read_text(encoding="utf-8"))
    }
    text = (ROOT / "docs/decisions/0013-deployment-on-flower.md").read_text(encoding="utf-8")
    (said,) = re.findall(r"not public\. They are in (.+?); nowhere else", text, re.DOTALL)
    named, folder = set(), ""
    for path in re.findall(r"[\w/]+\.py", said):
        folder = path.rpartition("/")[0] or folder
        named.add(f"{folder}/{path.rpartition('/')[2]}")
    assert found == named
