"""Kernels that compute only open units: the ops, their backends, and which backend ``"auto"`` takes."""

from gatelet.kernels._pattern import OpenPattern as OpenPattern
from gatelet.kernels.gated_linear import gated_linear as gated_linear
