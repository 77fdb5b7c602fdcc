"""An executor without PyTorch, for tests of many holders on one machine: it answers, and neither trains nor charges.

Everything around it is real: supervisor, node, link, and the executor's own loop. A real one holds 0.6 GB.
"""

import json
import sys
import tomllib
import types
from pathlib import Path


def install() -> None:
    """Put stand-ins in the place of the modules that would import PyTorch."""
    torch = types.ModuleType("torch")
    torch.Tensor = type("Tensor", (), {})
    torch.set_num_threads = lambda _: None
    workplace = types.ModuleType("fedhead.client.workplace")
    workplace.workplace_of = _no_ledger
    app = types.ModuleType("fedhead.client.app")
    app.app = answer
    sys.modules |= {"torch": torch, "fedhead.client.workplace": workplace, "fedhead.client.app": app}


def _no_ledger(_):
    raise LookupError("a stand-in has none")


def answer(message, context):
    """The holder's name to a greeting, and to a round the head as it came."""
    from flwr.app import ConfigRecord, Message, MessageType, MetricRecord, RecordDict

    from fedhead.common import protocol

    name = tomllib.loads(Path(context.node_config["holder"]).read_text())["name"]
    if message.metadata.message_type == MessageType.QUERY:
        return protocol.hello(message, name)
    request = json.loads(message.content[protocol.CONFIG]["request"])
    content = RecordDict(
        {
            protocol.ARRAYS: message.content[protocol.ARRAYS],
            protocol.METRICS: MetricRecord({protocol.WEIGHT: request["declared_records"]}),
            protocol.RELEASE: ConfigRecord({"holder": name, "event": ""}),
        }
    )
    return Message(content, reply_to=message)
