"""A deployed data holder in this process: a holder.toml on disk, and messages as a server would send them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from sklearn.datasets import load_digits

from fedhead.client import app as client_app
from fedhead.client import workplace
from fedhead.common import protocol
from fedhead.common.config import make_config, to_json
from fedhead.common.models.backbones import load_backbone
from fedhead.common.privacy.events import from_json
from fedhead.common.privacy.ledger import Ledger
from fedhead.common.refusals import TEXTS
from fedhead.common.round_request import RoundRequest

HOLDER = """
name = "st-mary"
[data]
source = "sklearn:digits"
labels = ["0", "1", "2", "3", "4", "5", "6", "7", "8", "9"]
[budget]
domain = "wards"
epsilon = 3.0
delta = 1e-5
{budget}
[limits]
modules = ["torch.nn:Identity"]
{limits}
[storage]
folder = "state"
"""


class Deployed:
    """One holder and a server that asks it."""

    def __init__(self, folder: Path, budget: str = "", limits: str = "", changes: dict | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.file = folder, folder / "holder.toml"
        self.file.write_text(HOLDER.format(budget=budget, limits=limits))
        recipe = {
            "task": {"labels": [str(digit) for digit in range(10)]},
            "model": {"backbone": "module:torch.nn:Identity"},
            "data": {"source": "sklearn:digits", "declared_records": 1500},
            "privacy": {"epsilon": 1.0, **(changes or {})},
            "training": {"rounds": 4},
        }
        self.config = make_config(recipe, base=folder)
        self.backbone = load_backbone(self.config.model, folder, vector_size=64).digest

    @property
    def ledger(self) -> Path:
        return self.folder / "state" / "ledger.sqlite"

    def request(self, **changes) -> RoundRequest:
        privacy = self.config.privacy
        fields = {
            "run": "run-1", "round": 1, "task": "classification", "backbone": self.backbone, "unit": privacy.unit,
            "mechanism": privacy.mechanism, "noise_multiplier": 20.0, "clipping_norm": 0.3,
            "sample_rate": privacy.sample_rate, "local_steps": 1, "declared_records": 1500,
            "optimizer": {"kind": "sgd"}, "learning_rate": 3.0, "seed": 7, "plan_steps": 1,
        }  # fmt: skip
        if privacy.unit == "person":
            fields["records_per_person"] = privacy.records_per_person
        return RoundRequest.model_validate({**fields, **changes})

    def message(self, request: RoundRequest, head: torch.Tensor | None = None, seen=None) -> Message:
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
        arrays = protocol.to_arrays(
            {"head.weight": torch.zeros(10, 64) if head is None else head, "head.bias": torch.zeros(10)}
        )
        content = RecordDict({protocol.ARRAYS: arrays, protocol.CONFIG: protocol.round_config(request)})
        return Message(protocol.with_mark(content, seen), dst_node_id=2, message_type="train")

    def send(self, message: Message) -> Message:
        context = Context(
            run_id=1, node_id=2, node_config={"holder": str(self.file)}, state=RecordDict(),
            run_config={"recipe": to_json(self.config)},
        )  # fmt: skip
        return client_app.app(message, context)

    def ask(self, head: torch.Tensor | None = None, seen=None, **changes) -> Message:
        return self.send(self.message(self.request(**changes), head, seen))

    def hello(self) -> Message:
        """The answer to the first query of a run, which opens the records."""
        message = self.message(self.request())
        message.metadata.message_type = "query"
        return self.send(message)

    @staticmethod
    def head_of(reply: Message) -> dict[str, np.ndarray]:
        """The head that was released."""
        assert not reply.has_error(), reply.error
        return {name: array.numpy() for name, array in reply.content[protocol.ARRAYS].items()}

    @staticmethod
    def code_of(reply: Message) -> int:
        """The code of a refusal, whose text is the code's own."""
        assert reply.has_error()
        _, code, text = protocol.read_refusal(reply)
        assert text == TEXTS[code]
        return code

    def spent(self) -> float:
        """Sum of steps / noise^2 that the ledger holds."""
        with Ledger(self.ledger) as ledger:
            ledger.verify()
            events = [from_json(one.event) for one in ledger.entries() if one.kind == "reserve"]
        return sum(event.steps / event.noise_multiplier**2 for event in events)

    def give_persons(self) -> None:
        """The same records from a file that says whose they are, four a patient."""
        digits = load_digits()
        rows = [
            {"vector": (image / 16).tolist(), "label": str(label), "patient": f"p{number // 4}"}
            for number, (image, label) in enumerate(zip(digits.data, digits.target, strict=True))
        ]
        self.give(rows)
        text = self.file.read_text()
        self.file.write_text(text.replace("[data]", '[data]\nperson = "patient"'))

    def give(self, rows: list[dict]) -> None:
        """Records in a file of their own, in place of those that were there."""
        (self.folder / "ward.json").write_text("\n".join(map(json.dumps, rows)))
        text = self.file.read_text()
        self.file.write_text(text.replace('source = "sklearn:digits"', 'source = "json:ward.json"'))

    def restart(self) -> None:
        """What a new process would start with."""
        for place in workplace._WORKPLACES.values():
            place.admission.close()
        workplace._WORKPLACES.clear()


@pytest.fixture
def deployed(tmp_path):
    """A maker of deployed holders: `deployed(limits="noise_multiplier_min = 1.0")`."""
    made = []

    def make(**settings) -> Deployed:
        made.append(Deployed(tmp_path / f"holder-{len(made)}", **settings))
        return made[-1]

    yield make
    for holder in made:
        holder.restart()
