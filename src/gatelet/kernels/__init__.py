"""Kernels that compute only open units: the ops, their backends, and which backend ``"auto"`` takes.

Imports go one way: ``pattern ← backends ← choose ← ops``.
"""

from gatelet.kernels.backends._activations import ACTIVATIONS as ACTIVATIONS
from gatelet.kernels.backends.rows import Decided as Decided
from gatelet.kernels.backends.rows import Int8Rows as Int8Rows
from gatelet.kernels.backends.rows import int8_rows as int8_rows
from gatelet.kernels.choose import Choice as Choice
from gatelet.kernels.choose import explain as explain
from gatelet.kernels.choose import measure_costs as measure_costs
from gatelet.kernels.ops import Decode as Decode
from gatelet.kernels.ops import SampledGates as SampledGates
from gatelet.kernels.ops import decode_ffn as decode_ffn
from gatelet.kernels.ops import decode_input_linear as decode_input_linear
from gatelet.kernels.ops import decode_linear as decode_linear
from gatelet.kernels.ops import gated_ffn as gated_ffn
from gatelet.kernels.ops import gated_input_linear as gated_input_linear
from gatelet.kernels.ops import gated_linear as gated_linear
from gatelet.kernels.ops import narrow_ffn as narrow_ffn
from gatelet.kernels.ops import narrow_input_linear as narrow_input_linear
from gatelet.kernels.ops import narrow_linear as narrow_linear
from gatelet.kernels.ops import open_pattern as open_pattern
from gatelet.kernels.ops import sample_gates as sample_gates
from gatelet.kernels.pattern import OpenPattern as OpenPattern
