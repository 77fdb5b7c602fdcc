"""A run that waits for nobody could not begin: no greeting is valid for 0 seconds."""

import pytest

from fedhead.common.errors import ConfigError
from fedhead.server.server_file import make_server


def test_a_wait_of_nothing_is_refused_in_the_file(tmp_path):
    with pytest.raises(ConfigError, match="holders_deadline is 0"):
        make_server({"certificates": "keys", "holders": ["north.pub"], "holders_deadline": 0.0}, tmp_path)
