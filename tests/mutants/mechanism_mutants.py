"""Privacy bugs in the training path, each planted into production code by a monkeypatch; see test_mutants.py."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from runpy import run_path
from types import SimpleNamespace
from typing import Any

NOISE, SUMS, EXCHANGES = (
    SimpleNamespace(**run_path(str(Path(__file__).with_name(f"faults_of_{what}.py"))))
    for what in ("noise", "sums", "exchanges")
)

MANY = {
    "privacy.mechanism": "poisson", "privacy.sample_rate": 0.2, "training.local_steps": 8, "training.rounds": 40
}  # fmt: skip
DROPPING = {"model.head": {"kind": "mlp", "hidden": [24], "dropout": 0.2}, "training.rounds": 8}
"""No closed form: canaries are planted gradients."""
POISSON = {"privacy.mechanism": "poisson", "privacy.sample_rate": 0.1, "training.local_steps": 4, "training.rounds": 12}


@dataclass(frozen=True)
class Mutant:
    """A planted bug, and which check must name it."""

    name: str
    plant: Callable[[Any], None]
    caught_by: str  # name of a check that must fail
    says: str  # pattern that its meaning, in small letters, must hold: the fault's name
    changes: dict[str, Any]
    seed: int | None = 7  # None: the noise of a deployment


MECHANISM_MUTANTS = [
    Mutant("no noise", NOISE.no_noise, "total-variance", "^no noise was added, or", {}),
    Mutant("noise halved", NOISE.noise_halved, "total-variance", r"^less noise was added than .* 0\.25", {}),
    Mutant(
        "noise missing on the bias",
        NOISE.noise_missing_on_the_bias,
        "group-variance",
        '^no noise .* to "head.bias"',
        {},
    ),
    Mutant(
        "noise missing on 5 % of the coordinates",
        NOISE.noise_missing_on_a_twentieth,
        "coordinate-variance",
        r"on 3\d of \d+ trained numbers\. no noise was added to them",
        {},
    ),
    Mutant("the same noise every step", NOISE.same_noise_every_step, "repeated-steps", "same noise was used more", {}),
    Mutant(
        "the same noise every step, of a deployment",
        NOISE.the_same_noise_every_step_of_a_deployment,
        "repeated-steps",
        "same noise was used more",
        {},
        None,
    ),
    Mutant(
        "clipping norm 1.5 times the claim",
        SUMS.clipping_norm_half_as_much_again,
        "largest-contribution",
        r"like any other is clipped to 1\.5 times",
        {},
    ),
    Mutant("clipping per batch", SUMS.clipping_a_batch_at_a_time, "exact-sums", "the batch is clipped as one", {}),
    Mutant(
        "sampling rate twice the accounted",
        SUMS.sampling_twice_as_often,
        "batch-mean",
        r"more often .* 0\.[12]\d*",
        POISSON,
    ),
    Mutant("shuffled batches accounted as Poisson", SUMS.shuffled_batches, "batch-variance", "fixed size", POISSON),
    Mutant(
        "divisor from the true record count",
        SUMS.divisor_from_the_true_count,
        "largest-contribution",
        "the divisor follows the true count",
        {},
    ),
    Mutant(
        "clipped 1 % too little, for one label",
        SUMS.a_looser_clip_for_one_label,
        "exact-sums",
        r"\d of \d+ records count 1\.01 times .* clipped too little",
        {},
    ),
    Mutant("noise halved where records are few", NOISE.noise_halved_where_records_are_few, "few-variance-7", "few", {}),
    Mutant("a leak in the last bits of the head", NOISE.a_leak_in_the_last_bits, "replay", "without noise", {}),
    Mutant("sampling by label", SUMS.sampling_by_label, "participation-by-label", "what they hold", MANY),
    Mutant(
        "a tenth of the noise before training",
        EXCHANGES.a_tenth_of_the_noise_between_request_and_training,
        "exchange-variance",
        "other noise",
        {},
    ),
    Mutant(
        "a tenth of the noise where there are records",
        EXCHANGES.a_tenth_of_the_noise_where_there_are_records,
        "exchange-variance",
        "other noise",
        {},
    ),
    Mutant(
        "a record counted again and again",
        EXCHANGES.a_record_counted_again_and_again,
        "exchange-variance",
        "another sum",
        {},
    ),
    Mutant("a head nudged after training", EXCHANGES.a_nudge_after_training, "exchange-head", "something else", {}),
    Mutant(
        "a repeated round trained again",
        EXCHANGES.a_repeated_round_trained_again,
        "exchange-repeated",
        "a second release of a round",
        {},
        None,
    ),
    Mutant("another head in the reply", EXCHANGES.another_head_in_the_reply, "exchange-head", "something else", {}),
    Mutant("a loss beside the head", EXCHANGES.a_loss_in_the_reply, "exchange-beside", "differs with the records", {}),
    Mutant("charged at twice the noise", EXCHANGES.charged_at_twice_the_noise, "exchange-charged", "charged with", {}),
    Mutant(
        "floats instead of the lattice", NOISE.floats_instead_of_the_lattice, "lattice", "between the steps", {}, None
    ),
    Mutant("noise reused in a retried round", NOISE.noise_used_again_in_a_retried_round, "retry", "again", {}, None),
    *(
        Mutant(f"mlp with dropout: {name}", plant, caught_by, says, DROPPING, seed)
        for name, plant, caught_by, says, seed in (
            ("no noise", NOISE.no_noise, "total-variance", "^no noise was added, or", 7),
            ("noise halved", NOISE.noise_halved, "total-variance", "^less noise was added than", 7),
            (
                "noise missing on biases",
                NOISE.noise_missing_on_the_bias,
                "group-variance",
                '^no noise .* to ".*bias"',
                7,
            ),
            ("the same noise every step", NOISE.same_noise_every_step, "repeated-steps", "same noise was used more", 7),
            (
                "clipping norm 1.5 times",
                SUMS.clipping_norm_half_as_much_again_on_any_path,
                "largest-contribution",
                r"like any other is clipped to 1\.5 times",
                7,
            ),
            (
                "clipping per batch",
                SUMS.clipping_a_batch_by_its_mean_norm,
                "exact-sums",
                "the batch is clipped as one",
                7,
            ),
            (
                "a layer left out of the norm",
                SUMS.a_layer_left_out_of_the_norm,
                "largest-contribution",
                "not clipped to",
                7,
            ),
            ("noise reused in a retry", NOISE.noise_used_again_in_a_retried_round, "retry", "again", None),
        )
    ),
]
PERSON_MUTANTS = [
    Mutant("persons: no noise", NOISE.no_noise, "total-variance", "^no noise was added, or", {}),
    Mutant(
        "persons: each record clipped by itself",
        SUMS.records_of_persons_clipped_by_themselves,
        "largest-contribution",
        "clipped",
        {},
    ),
    Mutant(
        "persons: divisor from the true count",
        SUMS.divisor_from_the_true_count,
        "largest-contribution",
        "the divisor follows the true count",
        {},
    ),
]
