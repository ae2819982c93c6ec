"""Exact gradients, and the bias, variance and cost of estimators on an objective or in a network.

``gatelet.diagnose`` is the function :func:`diagnose`; the rest is imported by ``from gatelet.diagnose import moments``.
"""

from gatelet.diagnose.exact import exact_gradient as exact_gradient
from gatelet.diagnose.measure import diagnose as diagnose
from gatelet.diagnose.models import ModelReport as ModelReport
from gatelet.diagnose.models import diagnose_model as diagnose_model
from gatelet.diagnose.moments import Moments as Moments
from gatelet.diagnose.moments import moments as moments
from gatelet.diagnose.recommend import Recommendation as Recommendation
from gatelet.diagnose.report import Report as Report
from gatelet.diagnose.row import Row as Row
