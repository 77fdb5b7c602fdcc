"""How a bug is planted: around a piece of production code, for the length of a test."""

from functools import wraps


def wrapped(monkeypatch, owner, name, around):
    real = getattr(owner, name)
    monkeypatch.setattr(owner, name, wraps(real)(lambda *args, **kwargs: around(real, *args, **kwargs)))
