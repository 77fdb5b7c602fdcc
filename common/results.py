"""The result of a run: what result.json holds.

    Result          one run
    ├── RoundRow    one round: what it cost, the metrics where it was evaluated, and estimates from noised counts
    ├── SpendRow    what one data holder spent, and every mechanism event behind it
    └── HolderRow   what only a simulator knows of a data holder

The file is strict JSON: an infinite epsilon is written as the text "inf", never as a bare Infinity. Floats come back
bit for bit. The file is written aside and renamed, so that a reader finds the whole of it or none.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Final, NotRequired, cast

from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict  # pydantic asks for this one before Python 3.12

from fedhead.common.errors import InputError
from fedhead.common.writing import write_aside

SCHEMA: Final = 1
FILE: Final = "result.json"
SEEDS: Final = "seeds.json"  # over runs from several seeds
NOISE_BAR: Final = 1.96
"""Standard errors to each side that an estimate is shown with: noise alone stays within in 95 of 100 cases."""
_NUMBERS: Final[Mapping[str, float]] = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}
_STRICT: Final = ConfigDict(extra="forbid", strict=True)


def _number(value: Any) -> Any:
    return _NUMBERS.get(value, value) if isinstance(value, str) else value


Number = Annotated[float, BeforeValidator(_number)]
Count = Annotated[int, Field(ge=0)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Epsilon = Annotated[float, BeforeValidator(_number), Field(ge=0)]  # refuses NaN: a claim has to be a number
Delta = Annotated[float, Field(ge=0, le=1)]
Metrics = dict[str, Number]


@with_config(_STRICT)
class RefusalRow(TypedDict):
    """A data holder that sent no update, with the fixed code and text that left it."""

    holder: str
    code: int
    text: str


@with_config(_STRICT)
class NoisedRow(TypedDict):
    """Accuracy on records that the holders keep apart, estimated from noised counts over a declared number of units.

    Of the head that the round began with. Noise carries it below 0 and above 1, and its standard error is of the noise
    alone.
    """

    accuracy: Annotated[float, Field(allow_inf_nan=False)]
    standard_error: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    holders: Annotated[int, Field(ge=1)]


@with_config(_STRICT)
class RoundRow(TypedDict):
    """One round; `metrics` is None where it was not evaluated, `epsilon` the largest over the holders after it.

    `noised` is there when holders released noised counts.
    """

    round: Annotated[int, Field(ge=1)]
    metrics: Metrics | None
    seconds: Seconds
    bytes_up: Count
    bytes_down: Count
    holders: Count
    refused: list[RefusalRow]
    epsilon: Epsilon | None
    noised: NotRequired[NoisedRow | None]


@with_config(_STRICT)
class EventRow(TypedDict):
    """A mechanism event; what the mechanism doesn't have is None."""

    mechanism: str
    noise_multiplier: NotRequired[Annotated[float, Field(ge=0)] | None]
    sample_rate: NotRequired[Annotated[float, Field(ge=0, le=1)] | None]
    steps: Annotated[int, Field(ge=1)]
    clipping_norm: NotRequired[Annotated[float, Field(gt=0)] | None]
    round: Annotated[int, Field(ge=1)]
    schema: NotRequired[int]


@with_config(_STRICT)
class SpendRow(TypedDict):
    """What one data holder spent over all rounds, and the events that it is composed from."""

    holder: str
    unit: str
    adjacency: str
    mechanism: str
    accountant: str
    epsilon: Epsilon
    delta: Delta
    events: list[EventRow]


@with_config(_STRICT)
class HolderRow(TypedDict):
    """What a simulator, and nobody in a deployment, knows of a data holder."""

    name: str
    records: Count
    persons: NotRequired[Count]
    value: NotRequired[str]  # of the column that tells the holders apart
    labels: dict[str, Count]
    metrics: Metrics
    metrics_on: NotRequired[str]


@with_config(_STRICT)
class ModelRow(TypedDict):
    """What was trained."""

    backbone: str
    digest: str
    trained_parameters: Count
    task: str


@with_config(_STRICT)
class DeclaredRow(TypedDict):
    """The divisor and weight of every holder, and where it comes from."""

    value: Annotated[int, Field(ge=1)]
    origin: str


_SHAPES: Final[Mapping[str, Any]] = {
    "fedhead": str,
    "name": str,
    "config": dict[str, Any],
    "rounds": list[RoundRow],
    "final": Metrics,
    "majority": Metrics,
    "baseline": Metrics | None,
    "privacy": list[SpendRow],
    "holders": list[HolderRow],
    "model": ModelRow,
    "declared_records": DeclaredRow,
    "timing": dict[str, Seconds],
    "notes": list[str],
}
_ADAPTERS: dict[str, TypeAdapter[Any]] = {}


@dataclass(frozen=True)
class Result:
    """The result of a run.

    Parameters
    ----------
    fedhead : str
        Version that made it.
    name : str
        Of the recipe.
    config : mapping
        The recipe as nested tables.
    rounds : sequence of RoundRow
        In order.
    final, majority : mapping of str to float
        Metrics on the test records of the final head, and of always answering the most frequent label.
    baseline : mapping of str to float, or None
        Metrics of the same head trained without privacy.
    privacy : sequence of SpendRow
        What each data holder spent.
    holders : sequence of HolderRow
        In simulation only; empty in a deployment.
    model : ModelRow
    declared_records : DeclaredRow
    timing : mapping of str to float
        `load_seconds` (imports, weights), `features_seconds`, `training_seconds`, `server_seconds`, `total_seconds`.
        The total runs from the first record read to the last result; load stands apart.
    notes : sequence of str
        What a reader should know.
    folder : Path or None
        Where the result lies; not part of the file, and not compared.

    Raises
    ------
    InputError
        When a part has another shape than its row says; names the first fault, never a value.
    """

    fedhead: str
    name: str
    config: Mapping[str, Any]
    rounds: Sequence[Mapping[str, Any]]
    final: Mapping[str, float]
    majority: Mapping[str, float]
    baseline: Mapping[str, float] | None
    privacy: Sequence[Mapping[str, Any]]
    holders: Sequence[Mapping[str, Any]]
    model: Mapping[str, Any]
    declared_records: Mapping[str, Any]
    timing: Mapping[str, float]
    notes: Sequence[str]
    folder: Path | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        for name, shape in _SHAPES.items():
            if name not in _ADAPTERS:
                _ADAPTERS[name] = TypeAdapter(shape)
            given = getattr(self, name)
            given = list(given) if isinstance(given, tuple) else given
            try:
                # Validation copies what it checks: later changes of the caller's lists don't reach the result.
                object.__setattr__(self, name, _ADAPTERS[name].validate_python(given, strict=True))
            except ValidationError as error:
                first = error.errors(include_input=False, include_url=False)[0]
                where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"])
                rule = first["msg"][:1].lower() + first["msg"][1:]
                raise InputError(
                    f"result.{name}{where} is not valid: {rule}. Restore the file, or run again."
                ) from error

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON can carry it: what is not finite is the text "inf", "-inf" or "nan"."""
        parts = {item.name: getattr(self, item.name) for item in fields(self) if item.name != "folder"}
        return {"schema": SCHEMA, **cast(dict[str, Any], finite(parts))}

    def to_json(self) -> str:
        """The text of result.json: strict JSON, one line a part and one a row, to be read by people too."""
        return "{\n" + ",\n".join(f"{_dumps(key)}: {_part(value)}" for key, value in self.to_dict().items()) + "\n}\n"

    @classmethod
    def from_json(cls, text: str, folder: Path | None = None) -> Result:
        """The result that `to_json` wrote; equal to it in every bit of every float.

        Raises
        ------
        InputError
            When the text is no such result, or of another schema. One line.
        """
        shown = f'result is "{folder / FILE}"' if folder is not None else "result"
        try:
            data = json.loads(text, parse_constant=_refuse)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{shown}: it is no valid JSON. Restore the file, or run again.") from error
        if not isinstance(data, dict) or "schema" not in data:
            raise InputError(f"{shown}: it has no schema, so fedhead did not write it. Name the folder of a run.")
        schema = data.pop("schema")
        if isinstance(schema, bool) or schema != SCHEMA:
            raise InputError(
                f"{shown}: its schema is {json.dumps(schema)[:20]}, this version reads {SCHEMA}. "
                "Read it with the fedhead that wrote it."
            )
        if set(data) != set(_SHAPES):
            odd = sorted(set(data) ^ set(_SHAPES))[0]
            rule = "is missing" if odd in _SHAPES else f'has an unknown part "{odd[:40]}"'
            named = f'its part "{odd}" {rule}' if odd in _SHAPES else f"it {rule}"
            raise InputError(f"{shown}: {named}. Restore the file, or run again.")
        return cls(**data, folder=folder)

    def write(self, folder: str | Path) -> Result:
        """Write result.json into a folder, which is made; gives the result with its folder set."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_aside(folder / FILE, self.to_json().encode())
        return replace(self, folder=folder)

    @classmethod
    def read(cls, folder: str | Path) -> Result:
        """Read result.json of a folder.

        Raises
        ------
        InputError
            When there is none, or it is broken. One line.
        """
        folder = Path(folder)
        try:
            text = (folder / FILE).read_text(encoding="utf-8")
        except (FileNotFoundError, NotADirectoryError) as error:
            remedy = 'Name the folder that "fedhead simulate" printed.'
            if (folder / SEEDS).is_file():
                remedy = "It has a run for each of several seeds: name one of these folders."
            raise InputError(f'RUN_DIR is "{folder}": there is no {FILE} in it. {remedy}') from error
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(
                f'RUN_DIR is "{folder}": its {FILE} can\'t be read. Restore the file, or run again.'
            ) from error
        return cls.from_json(text, folder)


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no JSON")


def finite(value: Any) -> Any:
    """A copy of what JSON is to hold, in which the numbers that JSON doesn't have are texts: inf, -inf, nan."""
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


def _dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _part(value: Any) -> str:
    if isinstance(value, list) and value:
        return "[\n " + ",\n ".join(map(_dumps, value)) + "\n]"
    return _dumps(value)
