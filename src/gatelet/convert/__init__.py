"""An existing model made conditional, fitted to what it was, and reported on.

``block`` (where a block's parts lie) ← ``run`` (what computes it) ← ``find`` ← ``swap`` ← ``distil``, ``report``.
"""

from gatelet.convert.distil import Distillation as Distillation
from gatelet.convert.distil import distil as distil
from gatelet.convert.report import Report as Report
from gatelet.convert.report import report as report
from gatelet.convert.swap import Conversion as Conversion
from gatelet.convert.swap import blocks as blocks
from gatelet.convert.swap import convert as convert
from gatelet.convert.swap import revert as revert
