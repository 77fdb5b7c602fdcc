"""The mechanism audit's experiment: canaries through the production training path, and what it then releases.

canaries.py      crafted records whose clipped gradients are known and lie in coordinates of their own
planted.py       crafted gradients, where there is no closed form
planting.py      the hooks that put these where production captures gradients
setup.py         the training path, the records and the canaries that are audited
reference.py     an independent second way to the clipped sum: one record at a time, by autograd, in float64
dropped.py       what dropout dropped, for the reference to drop the same
watching.py      records what was sampled and what was released, without touching either
experiment.py    rounds on records with canaries, each put in or left out by a fair coin
contributions.py whether one record or person moves a sum by more than the clipping norm
"""
