"""Write accounting.json: epsilon by dp-accounting's PLD accountant, the second of two independent accountants.

    python tests/golden/make_accounting.py

Full batch is accounted as a Gaussian mechanism, Poisson as a Poisson-sampled one; the grid of losses has spacing 1e-4,
and the figure is the pessimistic one. `least` is the optimistic figure: the truth lies between the two.
"""

from __future__ import annotations

import itertools
import json
import logging
from pathlib import Path

from dp_accounting.pld import privacy_loss_distribution as pld

INTERVAL = 1e-4


def epsilon(noise: float, rate: float, steps: int, delta: float, pessimistic: bool) -> float:
    one = pld.from_gaussian_mechanism(
        noise, value_discretization_interval=INTERVAL, sampling_prob=rate, pessimistic_estimate=pessimistic
    )
    return float(one.self_compose(steps).get_epsilon_for_delta(delta))


def main() -> None:
    logging.disable(logging.WARNING)  # the optimistic figure takes another method, and says so every time
    full = itertools.product((2.0, 5.0, 10.0, 20.0, 40.0), (None,), (1, 20, 60, 300), (1e-5, 1e-6))
    poisson = itertools.product((0.8, 1.5, 4.0), (0.01, 0.05, 0.2), (60, 600), (1e-5,))
    more = itertools.product((1.0, 2.0), (0.02, 0.1), (100,), (1e-6, 1e-4))
    rows = []
    for noise, rate, steps, delta in [*full, *poisson, *more]:
        found = epsilon(noise, rate or 1.0, steps, delta, True)
        if found < 0.15:
            continue  # the PRV accountant adds its error bound of 0.001 to epsilon: no 1 % down there
        row = {"noise_multiplier": noise, "sample_rate": rate, "steps": steps, "delta": delta}
        rows.append({**row, "epsilon": found, "least": epsilon(noise, rate or 1.0, steps, delta, False)})
    text = json.dumps({"schema": 1, "interval": INTERVAL, "rows": rows}, indent=1)
    Path(__file__).with_name("accounting.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
