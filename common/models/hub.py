"""Folders of the Hugging Face hub, from its cache or downloaded, without noise and without waiting when offline."""

from __future__ import annotations

import logging
import socket
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlparse

import huggingface_hub
import transformers.utils.logging as transformers_logging
from huggingface_hub import constants
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from fedhead.common.errors import ModelError
from fedhead.common.models.weights import NO_DOWNLOADS, WEIGHT_FILES, offline

SMALL_FILES = ["*.json", "*.txt", "*.model"]  # configuration and tokenizer


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and no warnings of transformers and the hub, as they were before afterwards."""
    bars = transformers_logging.is_progress_bar_enabled()
    level = transformers_logging.get_verbosity()
    hub_bars_off = are_progress_bars_disabled()
    hub_log = logging.getLogger("huggingface_hub")
    hub_level = hub_log.level
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    disable_progress_bars()
    hub_log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        if bars:
            transformers_logging.enable_progress_bar()
        if not hub_bars_off:
            enable_progress_bars()
        transformers_logging.set_verbosity(level)
        hub_log.setLevel(hub_level)


def hub_folder(name: str, backbone: str) -> Path:
    """The local copy of a hub repository's configuration, tokenizer and weights, downloaded when it is not there.

    Parameters
    ----------
    name : str
        The hub's id, such as ``sentence-transformers/all-MiniLM-L6-v2``.
    backbone : str
        As in the recipe, for errors.

    Raises
    ------
    ModelError
        When it is neither in the cache nor to be had.
    """
    shown = f'model.backbone is "{backbone}"'
    with quiet():
        cached = _snapshot(name, [*SMALL_FILES, *WEIGHT_FILES], local=True)
        if cached is not None:
            return cached
        if offline():
            raise ModelError(
                f"{shown}: it is not in the hub's cache, and {NO_DOWNLOADS}or set model.weights to a folder with "
                "config.json, the tokenizer and model.safetensors."
            )
        if not _online():
            raise ModelError(
                f"{shown}: it is not in the hub's cache and the hub can't be reached. Connect to the network once, or "
                "set model.weights to a folder with config.json, the tokenizer and model.safetensors."
            )
        for weights in ("model*.safetensors", "pytorch_model*.bin"):
            folder = _snapshot(name, [*SMALL_FILES, weights], local=False)
            if folder is not None:
                return folder
    raise ModelError(
        f"{shown}: it can't be downloaded from the hub. Check the id and the network, or set model.weights to a folder "
        "with config.json, the tokenizer and model.safetensors."
    )


def _snapshot(name: str, patterns: list[str], local: bool) -> Path | None:
    """The folder if it has weights in it; None when it can't be had, for whatever reason the hub's client gives."""
    try:
        folder = Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns, local_files_only=local))
    except Exception:  # its errors share no base: HTTP, validation, missing files, offline mode
        return None
    found = (folder / "config.json").is_file() and any(
        True for pattern in ("model*.safetensors", "pytorch_model*.bin") for _ in folder.glob(pattern)
    )
    return folder if found else None


def _online() -> bool:
    """Whether the hub's name resolves: its client would retry for half a minute before it says no."""
    if urllib.request.getproxies():
        return True  # the proxy resolves the name
    try:
        socket.getaddrinfo(urlparse(constants.ENDPOINT).hostname, 443)
    except OSError:
        return False
    return True
