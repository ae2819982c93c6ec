"""gatelet: networks that decide, per example, which of their units to compute."""

from importlib.metadata import version as _version

from gatelet import estimators as estimators
from gatelet import kernels as kernels
from gatelet import nn as nn
from gatelet import sparsity as sparsity
from gatelet.convert import convert as convert
from gatelet.convert import distil as distil
from gatelet.convert import load as load
from gatelet.convert import report as report
from gatelet.convert import revert as revert
from gatelet.convert import save as save
from gatelet.diagnose import diagnose as diagnose
from gatelet.diagnose import diagnose_model as diagnose_model
from gatelet.diagnose import exact_gradient as exact_gradient
from gatelet.diagnose import moments as moments
from gatelet.row_adam import RowAdam as RowAdam
from gatelet.tape import Tape as Tape
from gatelet.tape import surrogate as surrogate
from gatelet.units import StochasticUnit as StochasticUnit
from gatelet.units import sampling as sampling

__version__ = _version("gatelet")
