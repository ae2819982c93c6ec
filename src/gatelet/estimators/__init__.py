"""Every estimator, and the one list of them: ``ALL``."""

from collections.abc import Mapping
from types import MappingProxyType

from gatelet._checks import check_choice
from gatelet.estimators._base import Estimator as Estimator
from gatelet.estimators._base import Objective as Objective
from gatelet.estimators.antithetic import ARM as ARM
from gatelet.estimators.antithetic import DisARM as DisARM
from gatelet.estimators.arms import ARMS as ARMS
from gatelet.estimators.arsm import ARSM as ARSM
from gatelet.estimators.bit_flip import BitFlip as BitFlip
from gatelet.estimators.carms import CARMS as CARMS
from gatelet.estimators.concrete import Concrete as Concrete
from gatelet.estimators.concrete import StraightThroughGumbel as StraightThroughGumbel
from gatelet.estimators.decoupled import DecoupledStraightThrough as DecoupledStraightThrough
from gatelet.estimators.deterministic import NoisySigmoid as NoisySigmoid
from gatelet.estimators.deterministic import Rectifier as Rectifier
from gatelet.estimators.deterministic import Sigmoid as Sigmoid
from gatelet.estimators.double_control import DoubleControlVariates as DoubleControlVariates
from gatelet.estimators.enumeration import Enumeration as Enumeration
from gatelet.estimators.gapped_straight_through import GappedStraightThrough as GappedStraightThrough
from gatelet.estimators.gumbel_rao import GumbelRao as GumbelRao
from gatelet.estimators.hard_concrete import HardConcrete as HardConcrete
from gatelet.estimators.implicit_mle import AIMLE as AIMLE
from gatelet.estimators.implicit_mle import IMLE as IMLE
from gatelet.estimators.jump_relu import JumpReLU as JumpReLU
from gatelet.estimators.leave_one_out import LeaveOneOut as LeaveOneOut
from gatelet.estimators.local_expectation import LocalExpectation as LocalExpectation
from gatelet.estimators.muprop import MuProp as MuProp
from gatelet.estimators.noisy_rectifier import NoisyRectifier as NoisyRectifier
from gatelet.estimators.nvil import NVIL as NVIL
from gatelet.estimators.perturbation import SPSA as SPSA
from gatelet.estimators.perturbation import FieteSeung as FieteSeung
from gatelet.estimators.perturbation import FiniteDifferences as FiniteDifferences
from gatelet.estimators.rebar import REBAR as REBAR
from gatelet.estimators.rebar import RELAX as RELAX
from gatelet.estimators.reinmax import ReinMax as ReinMax
from gatelet.estimators.rodeo import RODEO as RODEO
from gatelet.estimators.score_function import ScoreFunction as ScoreFunction
from gatelet.estimators.shrunk_baseline import ShrunkBaseline as ShrunkBaseline
from gatelet.estimators.simple import SIMPLE as SIMPLE
from gatelet.estimators.smooth_times_stochastic import SmoothTimesStochastic as SmoothTimesStochastic
from gatelet.estimators.sparse_maps import Entmax as Entmax
from gatelet.estimators.sparse_maps import Sparsemax as Sparsemax
from gatelet.estimators.sparse_straight_through import StraightThroughOpen as StraightThroughOpen
from gatelet.estimators.sparse_straight_through import StraightThroughSampled as StraightThroughSampled
from gatelet.estimators.stochastic_gates import StochasticGates as StochasticGates
from gatelet.estimators.straight_through import ClippedStraightThrough as ClippedStraightThrough
from gatelet.estimators.straight_through import StraightThrough as StraightThrough
from gatelet.estimators.top_k import TopK as TopK
from gatelet.estimators.unordered_set import UnorderedSet as UnorderedSet
from gatelet.estimators.vimco import VIMCO as VIMCO
from gatelet.estimators.zgr import DARN as DARN
from gatelet.estimators.zgr import ZGR as ZGR

ALL: Mapping[str, type[Estimator]] = MappingProxyType(
    {
        # the paper
        "noisy_rectifier": NoisyRectifier,
        "smooth_times_stochastic": SmoothTimesStochastic,
        "score_function": ScoreFunction,
        "straight_through": StraightThrough,
        "rectifier": Rectifier,
        "sigmoid": Sigmoid,
        "noisy_sigmoid": NoisySigmoid,
        # straight-through's successors
        "straight_through_open": StraightThroughOpen,
        "straight_through_sampled": StraightThroughSampled,
        "clipped_straight_through": ClippedStraightThrough,
        "reinmax": ReinMax,
        "straight_through_gumbel": StraightThroughGumbel,
        "gumbel_rao": GumbelRao,
        "gapped_straight_through": GappedStraightThrough,
        "darn": DARN,
        "zgr": ZGR,
        "decoupled_straight_through": DecoupledStraightThrough,
        # hard thresholds
        "jump_relu": JumpReLU,
        "top_k": TopK,
        "sparsemax": Sparsemax,
        "entmax": Entmax,
        # exactly k of N (and what else has kind="subset")
        "simple": SIMPLE,
        "imle": IMLE,
        "aimle": AIMLE,
        # relaxed gates
        "concrete": Concrete,
        "hard_concrete": HardConcrete,
        "stochastic_gates": StochasticGates,
        # score function with other baselines and control variates
        "leave_one_out": LeaveOneOut,
        "shrunk_baseline": ShrunkBaseline,
        "double_control_variates": DoubleControlVariates,
        "rodeo": RODEO,
        "vimco": VIMCO,
        "nvil": NVIL,
        "muprop": MuProp,
        "rebar": REBAR,
        "relax": RELAX,
        # antithetic pairs
        "arm": ARM,
        "disarm": DisARM,
        "arms": ARMS,
        "carms": CARMS,
        "arsm": ARSM,
        # several evaluations per unit
        "local_expectation": LocalExpectation,
        "bit_flip": BitFlip,
        "enumeration": Enumeration,
        "unordered_set": UnorderedSet,
        # perturbation, the paper's prior work
        "finite_differences": FiniteDifferences,
        "spsa": SPSA,
        "fiete_seung": FieteSeung,
    }
)


def resolve(estimator: str | Estimator) -> Estimator:
    """Return the estimator itself, or a new one of the class that ``ALL`` has under this name.

    Args:
        estimator: a name of ``ALL``, or an instance.

    Raises:
        ValueError: for an unknown name.
        TypeError: for anything else, a class included.

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
