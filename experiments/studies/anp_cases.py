"""What the ANP study consists of: networks and episodes, scores, levels of sparsity. Data only."""

from typing import Any, NamedTuple

__all__ = ["AT_ONCE", "CASES", "LEVELS", "MAIN", "SCORES", "Case", "ScoreCase"]

LEVELS = (0.5, 0.7, 0.85, 0.95)
# Sparsities at which a trained network is pruned at once, without training after it.
AT_ONCE = (0.3, 0.5, 0.7, 0.85)


class ScoreCase(NamedTuple):
  """A way to prune: `fields` of a config's part `prune`, and what a reader sees of it."""

  label: str
  fields: dict[str, Any]


SCORES: dict[str, ScoreCase] = {
  "none": ScoreCase("not pruned", {}),
  "anp": ScoreCase("ANP", {"score": "anp", "average": "absolute"}),
  "anp_first_order": ScoreCase("ANP, first-order", {"score": "anp", "average": "absolute", "derivative": "first_order"}),
  "anp_start": ScoreCase("ANP, mask at the start only", {"score": "anp", "average": "absolute", "mask_in": "start"}),
  "anp_layer": ScoreCase("ANP, layer-wise", {"score": "anp", "average": "absolute", "scope": "layer"}),
  "anp_signed": ScoreCase("ANP, signed", {"score": "anp", "average": "signed"}),
  "snip": ScoreCase("SNIP / Taylor on the ordinary loss", {"score": "snip", "average": "absolute"}),
  "snip_signed": ScoreCase("SNIP / Taylor on the ordinary loss, signed", {"score": "snip", "average": "signed"}),
  "magnitude": ScoreCase("magnitude", {"score": "magnitude"}),
  "magnitude_layer": ScoreCase("magnitude, layer-wise", {"score": "magnitude", "scope": "layer"}),
  "random": ScoreCase("random", {"score": "random"}),
}


class Case(NamedTuple):
  """A network and a kind of episodes; `steps` of meta-training, then each of `level_steps` in turn at each level of sparsity.

  With `trained`, another case that differs only in how it prunes, that one's network is taken, if it is there.
  """

  title: str
  fields: dict[str, Any]
  steps: int
  level_steps: tuple[int, ...]
  trained: str | None = None


# Of the scores that are not here, a course with few steps per level is enough.
MAIN = ("none", "anp", "snip", "magnitude")
# ANIL, because a step of it costs a third of MAML's and reaches more in the same time; `conv4-1-maml` is there to compare.
_ANIL = {"learner": "anil", "train_queries": 5}
_CONV4 = {"widths": (64, 64, 64, 64)}
_RESNET = {"model": "resnet12", "widths": (16, 32, 64, 128)}
CASES = {
  "conv4-1": Case("Conv-4 (64), ANIL, 5-way 1-shot", _ANIL | _CONV4 | {"shots": 1}, 8000, (50, 400, 1600)),
  "conv4-5": Case("Conv-4 (64), ANIL, 5-way 5-shot", _ANIL | _CONV4 | {"shots": 5}, 5000, (50, 400)),
  "resnet12-1": Case("ResNet-12 (16-32-64-128), ANIL, 5-way 1-shot", _ANIL | _RESNET | {"shots": 1}, 4000, (50, 400)),
  "resnet12-5": Case("ResNet-12 (16-32-64-128), ANIL, 5-way 5-shot", _ANIL | _RESNET | {"shots": 5}, 3000, (50, 400)),
  "conv4-1-filters": Case(
    "Conv-4 (64), ANIL, 5-way 1-shot, whole filters",
    _ANIL | _CONV4 | {"shots": 1, "prune": {"granularity": "channel", "channel_score": "sum"}},
    8000,
    (50,),
    trained="conv4-1",
  ),
  "conv4-1-maml": Case("Conv-4 (32), MAML, 5-way 1-shot", {"shots": 1}, 8000, (50, 400)),
}
