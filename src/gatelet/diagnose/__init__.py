"""Exact gradients, and the bias, variance and cost of estimators on an objective."""

from gatelet.diagnose.exact import exact_gradient as exact_gradient
from gatelet.diagnose.moments import Moments as Moments
from gatelet.diagnose.moments import moments as moments
