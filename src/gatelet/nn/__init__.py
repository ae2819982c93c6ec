"""Conditional layers (section 5 of the paper)."""

from gatelet.nn.conditional_linear import ConditionalLinear as ConditionalLinear
from gatelet.nn.gater import Gater as Gater
