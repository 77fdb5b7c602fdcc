"""The workplace of one data holder in a deployment, from its own holder.toml and a recipe that arrived.

Of the recipe only the model, the task and the numbers of training count. Records, person column, budget, limits, ledger
and cache are the holder's own, noise comes from its operating system, and sums are taken in float64.
"""

from __future__ import annotations

import logging
from contextlib import suppress
from pathlib import Path
from typing import Final

from fedhead.client.admission import Admission
from fedhead.client.domains import Domains, identities
from fedhead.client.holder import MADE, HolderFile, load_holder
from fedhead.client.keeping import keep_newest
from fedhead.client.own_records import counted, own_records
from fedhead.client.placing import alone, place
from fedhead.client.policy import check_request
from fedhead.client.timing import preparing
from fedhead.client.training import Trainer
from fedhead.client.workplace import Workplace, fingerprint
from fedhead.common.config import RunConfig, changed, from_json
from fedhead.common.config.places import in_package
from fedhead.common.config.schema import FeatureSettings, ModelSettings
from fedhead.common.data.paths import SCHEME
from fedhead.common.data.records import Records
from fedhead.common.errors import InputError, ModelError
from fedhead.common.failpoints import reach
from fedhead.common.features.extraction import cache_key
from fedhead.common.models.backbones import Backbone, load_backbone
from fedhead.common.models.trainable import Trainable
from fedhead.common.preparation import Split, check_kind, featurize, load_backbone_for, make_trainable
from fedhead.common.privacy.lattice import check_sums
from fedhead.common.privacy.ledger import Ledger, LedgerError, Mark, stored_mark
from fedhead.common.refusals import OTHER_BACKBONE, refusal
from fedhead.common.round_request import RoundRequest
from fedhead.common.tasks import make_task
from fedhead.common.writing import write_aside

log = logging.getLogger("fedhead.client")

_SIDE: Final = 224  # pixels; of the usual image


def look_first(path: Path, recipe: str, request: RoundRequest) -> None:
    """Refuse what the holder's own file refuses of a recipe and a request, before a record or a backbone is opened.

    Raises
    ------
    Refused
        The request is beyond the limits.
    InputError
        The file can't be used, or the recipe names what the holder doesn't allow.
    """
    holder = load_holder(path)
    own_recipe(holder, from_json(recipe))
    check_request(request, holder.limits, budgeted=request.unit != "holder")


def deploy(path: Path, recipe: str) -> Workplace:
    """The workplace of the holder whose file is at `path`, for a recipe as `to_json` writes it.

    Raises
    ------
    InputError
        The file or the records can't be used, the recipe names code or files that the holder doesn't allow, or
        features take longer than limits.prepare_seconds. The server learns a fixed code only.
    Refused
        The recipe's backbone is none that the holder allows.
    """
    holder = load_holder(path)
    with preparing(holder.limits.prepare_seconds):
        return _deploy(holder, own_recipe(holder, from_json(recipe)))


def _deploy(holder: HolderFile, config: RunConfig) -> Workplace:
    check_ledger(holder)
    backbone = _backbone_alone(config)
    if backbone is not None:
        _check_backbone(holder, backbone)
    records = own_records(holder, config)
    holder.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    check_disjoint(holder, records)
    if backbone is None or backbone.kind == "vector":
        backbone, _ = load_backbone_for(config, records)
        _check_backbone(holder, backbone)
    check_kind(config, backbone, records)
    trainable = make_trainable(config, backbone, make_task(config.task))
    if not holder.limits.allow_seeded_noise:
        trainable.double()  # what the sensitivity of a release is proved for
    keep_newest(holder.features, cache_key(backbone, records, config.model.features))
    features = featurize(config, backbone, records, holder.features, "features")
    split = alone(config, records)
    placed = place(config, features, split, [holder.name])
    if not holder.limits.allow_seeded_noise:
        check_rounding(split, trainable, config.privacy.person, holder.limits.most_records)
    # keyed: the ledger's hash leaves with every reply, and must not tell one set of records from another
    mark = fingerprint(records.digests(), records.labels, Domains(holder.folder).key())
    admission = Admission(open_ledger(holder), holder.limits, holder.budget, {holder.name: mark})
    trainer = Trainer(trainable, make_task(config.task), most_records=holder.limits.most_records)
    reach("holder.opened")
    return Workplace(config, backbone.digest, trainer, placed.training, admission, placed.apart)


def _backbone_alone(config: RunConfig) -> Backbone | None:
    """The recipe's backbone, where it can be loaded before the records: a module on vectors may need their length.

    Its digest doesn't depend on that length.
    """
    if not config.model.backbone.startswith("module:"):
        return load_backbone(config.model, config.base)
    for length in (None, 1):
        with suppress(ModelError):  # told when the records are there
            return load_backbone(config.model, config.base, vector_size=length)
    return None


def _check_backbone(holder: HolderFile, backbone: Backbone) -> None:
    allowed = holder.limits.backbones
    if allowed is not None and backbone.digest not in {digest.removeprefix("sha256:") for digest in allowed}:
        log.warning("limits.backbones lacks sha256:%s: a recipe asks for it. Add it to allow it.", backbone.digest)
        raise refusal(OTHER_BACKBONE)


def check_ledger(holder: HolderFile) -> None:
    """Refuse to begin anew where a ledger was: what it held is spent.

    Raises
    ------
    LedgerError
        The ledger is gone, or is of a data holder with another name.
    """
    if not holder.ledger.exists():
        if (holder.folder / MADE).exists():
            raise LedgerError(
                f"ledger {holder.ledger} is gone: what it held is spent. Restore its newest copy; for other people's "
                "records, which no ledger has charged yet, use another storage folder."
            )
        return
    with Ledger(holder.ledger) as ledger:
        others = sorted(set(ledger.holders()) - {holder.name})
    if others:
        raise LedgerError(
            f'ledger {holder.ledger} is of "{others[0]}": a holder keeps its name, because its budget goes with it. '
            f'Set name = "{others[0]}".'
        )


def mark_of(holder: HolderFile) -> Mark | None:
    """Where the ledger of a holder stands whose records are not open; None where it has no row or can't be read."""
    mark = stored_mark(holder.ledger, holder.name)
    return mark if mark is not None and mark.sequence else None


def open_ledger(holder: HolderFile) -> Ledger:
    """The holder's ledger; that there is one is remembered beside it."""
    ledger = Ledger(holder.ledger)
    if not (holder.folder / MADE).exists():
        write_aside(
            holder.folder / MADE,
            b"A ledger was made beside this file. Without it, nothing may be trained.\n",
            durable=True,
        )
    return ledger


def check_rounding(whole: Split, trainable: Trainable, person: str | None, most: int) -> None:
    """Refuse more records than the rounding of their sum is covered for: before any run, whatever a request says.

    Parameters
    ----------
    whole : Split
        All records of the holder. Those that are kept apart for counts are among them, and under the unit person those
        beyond the most a person: a server chooses both, and would else find out how many there are by what is refused.
    trainable : Trainable
    person : str or None
        The column of persons.
    most : int
        limits.most_records.

    Raises
    ------
    InputError
    """
    records = counted(whole.train, None if whole.persons is None else person)
    check_sums(records, list(trainable.trained().values()), most)


def check_disjoint(holder: HolderFile, records: Records) -> None:
    """Remember whose records the domain has, and hold its declarations to that, before anything is trained.

    Raises
    ------
    InputError
        Two domains that are declared disjoint share somebody.
    """
    domains, mine = Domains(holder.folder), holder.budget.domain
    domains.remember(mine, identities(records, holder.data.person))
    for other in holder.budget.disjoint_from:
        if domains.overlap(mine, other):
            raise InputError(
                f'budget.disjoint_from has "{other}": it shares records or persons with "{mine}". Remove it: the two '
                "domains then add up."
            )


def own_recipe(holder: HolderFile, config: RunConfig) -> RunConfig:
    """The recipe with the holder's records in place of those that it names.

    Raises
    ------
    InputError
        It names code or files on this machine that the holder doesn't allow.
    """
    _check_code(holder, config)
    labels = holder.data.labels
    if labels is None or sorted(labels) != sorted(config.task.labels):
        # decided without a look at the records: whether some label occurs is not for a server to find out
        raise InputError(
            "data.labels is not the list of labels that the recipe has: a holder trains for labels that its own file "
            "names. Set data.labels if you agree to them."
        )
    own = changed(
        config,
        {
            "model.features.batch_size": batch_size(config.model),  # how much is held at once is the holder's own
            "data.source": holder.data.source,
            "data.columns": dict(holder.data.columns),
            "privacy.person": holder.data.person,
            "holders.budget": None,
            "holders.limits": None,
        },
    )
    own._base = holder.base
    return own


def batch_size(model: ModelSettings) -> int:
    """How many records go through the backbone at once: fewer where a recipe asks for large images or long texts.

    A batch then takes about the memory of a usual one. A server could else have this process killed, and see by the
    size at which that happens whether there are enough records to fill a batch.
    """
    usual, longest = FeatureSettings().batch_size, ModelSettings.model_fields["max_length"].default
    share = min((_SIDE / (model.image.size or _SIDE)) ** 2, longest / model.max_length, 1.0)
    return max(1, int(usual * share))


def _check_code(holder: HolderFile, config: RunConfig) -> None:
    model, allowed = config.model, holder.limits.heads
    family, _, name = model.backbone.partition(":")
    if family == "transformers" and _is_folder(name, holder.base):
        raise InputError(
            f'model.backbone of a recipe is "{model.backbone}": a folder on this machine is not for a server to name. '
            "Have the recipe name the hub's."
        )
    for setting, text in (
        ("model.backbone", model.backbone), ("model.head.kind", model.head.kind), ("task.kind", config.task.kind)
    ):  # fmt: skip
        code = text.removeprefix("module:")
        if code != text and code not in holder.limits.modules:
            raise InputError(f'{setting} of a recipe is "{text}": limits.modules lacks it. Add "{code}" to allow it.')
    kind = "module" if model.head.kind.startswith("module:") else model.head.kind
    further = {"unfrozen": model.unfreeze > 0, "unnormalized": not model.features.normalize}
    for trained in (kind, *(word for word, wanted in further.items() if wanted)):
        if trained not in allowed:
            raise InputError(f'a recipe trains "{trained}": limits.heads lacks it. Add it to allow it.')
    weights = model.weights
    if weights is not None and not (weights.startswith(SCHEME) and in_package(weights.removeprefix(SCHEME))):
        raise InputError(
            f'model.weights of a recipe is "{weights}": a file on this machine is not for a server to name. '
            "Have the recipe name a package or the hub."
        )


def _is_folder(name: str, base: Path) -> bool:
    """Whether the hub's name is, or could be, a path here: from where join was started, or from the holder's file."""
    path = Path(name)
    return name.startswith((".", "/", "~")) or ".." in path.parts or path.exists() or (base / path).exists()
