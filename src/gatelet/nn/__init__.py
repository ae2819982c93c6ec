"""Conditional layers (section 5 of the paper)."""

from gatelet.nn.conditional_ffn import ConditionalFFN as ConditionalFFN
from gatelet.nn.conditional_layer import ConditionalLayer as ConditionalLayer
from gatelet.nn.conditional_layer import fully_open as fully_open
from gatelet.nn.conditional_layer import masking as masking
from gatelet.nn.conditional_linear import ConditionalLinear as ConditionalLinear
from gatelet.nn.gaters import Gater as Gater
from gatelet.nn.gaters import PreviewGater as PreviewGater
from gatelet.nn.gaters import SelfGater as SelfGater
from gatelet.nn.gaters import TwoStageGater as TwoStageGater
from gatelet.nn.sae_lens import load_sae_lens as load_sae_lens
from gatelet.nn.sparse_autoencoder import SAELoss as SAELoss
from gatelet.nn.sparse_autoencoder import SparseAutoencoder as SparseAutoencoder
from gatelet.nn.sparse_code import SparseCode as SparseCode
from gatelet.nn.spreading import spread as spread
