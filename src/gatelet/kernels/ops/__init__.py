"""The ops, a file each: checks, then forward and backward once over the products of whichever backend runs."""

from gatelet.kernels.ops.decode import Decode as Decode
from gatelet.kernels.ops.decode import decode_ffn as decode_ffn
from gatelet.kernels.ops.decode import decode_input_linear as decode_input_linear
from gatelet.kernels.ops.decode import decode_linear as decode_linear
from gatelet.kernels.ops.gated_ffn import gated_ffn as gated_ffn
from gatelet.kernels.ops.gated_input_linear import gated_input_linear as gated_input_linear
from gatelet.kernels.ops.gated_linear import gated_linear as gated_linear
from gatelet.kernels.ops.narrow import narrow_ffn as narrow_ffn
from gatelet.kernels.ops.narrow import narrow_input_linear as narrow_input_linear
from gatelet.kernels.ops.narrow import narrow_linear as narrow_linear
from gatelet.kernels.ops.open_pattern import open_pattern as open_pattern
from gatelet.kernels.ops.sample_gates import SampledGates as SampledGates
from gatelet.kernels.ops.sample_gates import sample_gates as sample_gates
