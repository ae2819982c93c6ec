"""An existing model made conditional, fitted to what it was, and reported on.

``block`` (where a block's parts lie) ← ``run`` (what computes it) ← ``find`` ← ``place``
← ``swap`` ← ``distil``, ``distil_output``, ``report``, ``save``
(``fitting``: what both ways of distilling share)
(``spread``: how much of each block is to be open)
(``describe``: what was converted, as plain data; ``hugging_face``: ``from_pretrained`` of a converted model).
"""

from gatelet.convert.distil import distil as distil
from gatelet.convert.distil_output import distil_output as distil_output
from gatelet.convert.fitting import Distillation as Distillation
from gatelet.convert.place import blocks as blocks
from gatelet.convert.report import Report as Report
from gatelet.convert.report import report as report
from gatelet.convert.rows import keep_rows as keep_rows
from gatelet.convert.rows import skip_inputs as skip_inputs
from gatelet.convert.save import load as load
from gatelet.convert.save import save as save
from gatelet.convert.spread import spread_rate as spread_rate
from gatelet.convert.swap import Conversion as Conversion
from gatelet.convert.swap import convert as convert
from gatelet.convert.swap import revert as revert
