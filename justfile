# The same recipes locally and in CI.
set shell := ["bash", "-euo", "pipefail", "-c"]

# everything that can be checked without running the program
check: lint types imports docs-check

lint:
    ruff check .
    ruff format --check .

types:
    mypy -p fedhead

imports:
    lint-imports

# the whole test suite, slow end-to-end runs included
test:
    pytest

# tests that take seconds
fast:
    pytest -m "not slow"

# pages that are made from the code
docs:
    python -m fedhead.common.config.reference docs/recipes.md

docs-check:
    python -m fedhead.common.config.reference docs/recipes.md --check

# ratios measured in one run; see docs/benchmarks.md
bench:
    python benchmarks/step.py
    python benchmarks/features.py
    python benchmarks/run.py
    python benchmarks/round.py
    python benchmarks/holders.py
    python benchmarks/ledger.py
    python benchmarks/exchange.py
    python benchmarks/audit.py
