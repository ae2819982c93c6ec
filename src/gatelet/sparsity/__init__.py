"""Holding the share of open gates at a target (supplement A.1 and A.2), and the test-time threshold (A.3)."""

from gatelet.estimators._distributed import alone as alone
from gatelet.sparsity._controller import Controller as Controller
from gatelet.sparsity._controller import penalty as penalty
from gatelet.sparsity.adaptive_l1 import AdaptiveL1 as AdaptiveL1
from gatelet.sparsity.beta_noise import BetaNoise as BetaNoise
from gatelet.sparsity.calibration import calibrate_thresholds as calibrate_thresholds
from gatelet.sparsity.firing_rate_bias import FiringRateBias as FiringRateBias
from gatelet.sparsity.kl_rate import KLRate as KLRate
from gatelet.sparsity.statistical_top_k import StatisticalTopK as StatisticalTopK
