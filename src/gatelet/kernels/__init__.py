"""Kernels that compute only open units: the ops, their backends, and which backend ``"auto"`` takes."""

from gatelet.kernels._dispatch import Choice as Choice
from gatelet.kernels._dispatch import explain as explain
from gatelet.kernels._pattern import OpenPattern as OpenPattern
from gatelet.kernels.gated_ffn import gated_ffn as gated_ffn
from gatelet.kernels.gated_linear import gated_linear as gated_linear
from gatelet.kernels.linear_gated import linear_gated as linear_gated
from gatelet.kernels.open_pattern import open_pattern as open_pattern
from gatelet.kernels.sample_gates import SampledGates as SampledGates
from gatelet.kernels.sample_gates import sample_gates as sample_gates
