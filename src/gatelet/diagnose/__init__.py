"""Exact gradients, and the bias, variance and cost of estimators on an objective.

``gatelet.diagnose`` is this package and, at once, its main function: ``gatelet.diagnose(objective, logits)`` is
:func:`gatelet.diagnose.report.diagnose`, ``gatelet.diagnose.moments`` and ``from gatelet.diagnose import moments`` are
what they look like.
"""

import sys
from types import ModuleType
from typing import cast

from gatelet.diagnose import report as _report
from gatelet.diagnose.exact import exact_gradient as exact_gradient
from gatelet.diagnose.moments import Moments as Moments
from gatelet.diagnose.moments import moments as moments
from gatelet.diagnose.report import Recommendation as Recommendation
from gatelet.diagnose.report import Report as Report
from gatelet.diagnose.report import Row as Row


class _Package(ModuleType):
    """A module that can be called; its attributes are declared for the type checker, which does not know of it."""

    Moments = Moments
    Recommendation = Recommendation
    Report = Report
    Row = Row
    exact_gradient = staticmethod(exact_gradient)
    moments = staticmethod(moments)
    __call__ = staticmethod(_report.diagnose)


# Python lets a module's class be replaced (3.5, bpo-24912); the module stays the one that `import` finds.
sys.modules[__name__].__class__ = _Package
diagnose = cast(_Package, sys.modules[__name__])
"""The package itself, under the type that it has: callable."""
