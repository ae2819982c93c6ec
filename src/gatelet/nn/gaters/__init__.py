"""What says which units of a wide layer to compute."""

from gatelet.nn.gaters.mlp import Gater as Gater
from gatelet.nn.gaters.mlp import glorot_ as glorot_
from gatelet.nn.gaters.own import SelfGater as SelfGater
from gatelet.nn.gaters.own import ThresholdUnit as ThresholdUnit

NAMES = ("mlp", "self")
