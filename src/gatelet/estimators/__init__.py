"""Every estimator, and the one list of them: ``ALL``."""

from collections.abc import Mapping
from types import MappingProxyType

from gatelet._checks import check_choice
from gatelet.estimators._base import Estimator as Estimator
from gatelet.estimators._base import Objective as Objective
from gatelet.estimators.deterministic import NoisySigmoid as NoisySigmoid
from gatelet.estimators.deterministic import Rectifier as Rectifier
from gatelet.estimators.deterministic import Sigmoid as Sigmoid
from gatelet.estimators.leave_one_out import LeaveOneOut as LeaveOneOut
from gatelet.estimators.noisy_rectifier import NoisyRectifier as NoisyRectifier
from gatelet.estimators.score_function import ScoreFunction as ScoreFunction
from gatelet.estimators.smooth_times_stochastic import SmoothTimesStochastic as SmoothTimesStochastic
from gatelet.estimators.straight_through import StraightThrough as StraightThrough

ALL: Mapping[str, type[Estimator]] = MappingProxyType(
    {
        "noisy_rectifier": NoisyRectifier,
        "smooth_times_stochastic": SmoothTimesStochastic,
        "score_function": ScoreFunction,
        "straight_through": StraightThrough,
        "leave_one_out": LeaveOneOut,
        "rectifier": Rectifier,
        "sigmoid": Sigmoid,
        "noisy_sigmoid": NoisySigmoid,
    }
)


def resolve(estimator: str | Estimator) -> Estimator:
    """Return the estimator itself, or a new one of the class that ``ALL`` has under this name.

    >>> resolve("straight_through")
    StraightThrough()
    """
    if isinstance(estimator, Estimator):
        return estimator
    if isinstance(estimator, str):
        return ALL[check_choice(estimator, ALL, "estimator")]()
    raise TypeError(
        "estimator must be a name of gatelet.estimators.ALL or an instance of an estimator, not "
        f"{estimator.__name__ + ' (a class: call it)' if isinstance(estimator, type) else type(estimator).__name__}"
    )
