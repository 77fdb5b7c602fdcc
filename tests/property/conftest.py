"""The deployed data holder of tests/federation, for properties too."""

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

_spec = spec_from_file_location("deployed_holder", Path(__file__).parents[1] / "federation" / "conftest.py")
assert _spec is not None
assert _spec.loader is not None
_module = module_from_spec(_spec)
_spec.loader.exec_module(_module)

deployed = _module.deployed
