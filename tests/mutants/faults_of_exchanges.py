"""Planted bugs between a request and its reply."""

from dataclasses import replace
from pathlib import Path
from runpy import run_path

import numpy as np
import torch

from fedhead.client import admission, app
from fedhead.common.errors import Refused

wrapped = run_path(str(Path(__file__).with_name("planting.py")))["wrapped"]


def a_tenth_of_the_noise_between_request_and_training(monkeypatch):
    real = app.step_plan
    monkeypatch.setattr(
        app, "step_plan",
        lambda *args: (plan := real(*args)) and replace(plan, noise_multiplier=plan.noise_multiplier / 10),
    )  # fmt: skip


def a_tenth_of_the_noise_where_there_are_records(monkeypatch):
    """Only on the way from a request to its reply; rounds without records have all of theirs."""

    def train(real, workplace, name, records, asked, streams):
        if len(records):
            noise = asked.request.noise_multiplier / 10
            asked = asked._replace(request=asked.request.model_copy(update={"noise_multiplier": noise}))
        return real(workplace, name, records, asked, streams)

    wrapped(monkeypatch, app, "_train", train)


def a_record_counted_again_and_again(monkeypatch):
    """On the way from a request to its reply, the first record is there 400 times."""

    def train(real, workplace, name, records, asked, streams):
        if len(records):
            records = records.take(np.concatenate([np.arange(len(records)), np.zeros(399, dtype=np.int64)]))
        return real(workplace, name, records, asked, streams)

    wrapped(monkeypatch, app, "_train", train)


def a_repeated_round_trained_again(monkeypatch):
    """And what the ledger then says is not heard: by itself it lets no second release out."""

    def release(real, self, holder, admitted, content):
        try:
            return real(self, holder, admitted, content)
        except Refused:
            return admitted.mark

    wrapped(monkeypatch, admission.Admission, "admit", lambda real, *args: replace(real(*args), payload=None))
    wrapped(monkeypatch, admission.Admission, "release", release)


def a_nudge_after_training(monkeypatch):
    """The number of records is added to the head after the trainer's last step, before it is kept and sent."""

    def train(real, workplace, name, records, asked, streams):
        real(workplace, name, records, asked, streams)
        with torch.no_grad():
            next(iter(workplace.trainable.trained().values())).add_(1e-3 * len(records))
        trained = workplace.trainable.trained()
        event = admission.event_of_request(asked.request).to_json()
        return app.protocol.released(trained, asked.request.declared_records, name, event, None)

    wrapped(monkeypatch, app, "_train", train)


def another_head_in_the_reply(monkeypatch):
    def train(real, workplace, name, records, request, streams):
        content = real(workplace, name, records, request, streams)
        state = workplace.trainable.trained()
        changed = {key: value + len(records) for key, value in state.items()}
        content[app.protocol.ARRAYS] = app.protocol.to_arrays(changed)
        return content

    wrapped(monkeypatch, app, "_train", train)


def a_loss_in_the_reply(monkeypatch):
    def train(real, workplace, name, records, request, streams):
        content = real(workplace, name, records, request, streams)
        content[app.protocol.METRICS]["loss"] = float(len(records))
        return content

    wrapped(monkeypatch, app, "_train", train)


def charged_at_twice_the_noise(monkeypatch):
    real = admission.event_of_request
    monkeypatch.setattr(
        admission, "event_of_request",
        lambda request: real(request.model_copy(update={"noise_multiplier": 2 * request.noise_multiplier})),
    )  # fmt: skip
