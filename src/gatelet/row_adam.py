"""RowAdam: Adam for weights when each step touches only some of their rows."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam

from gatelet._checks import check_positive, check_weight
from gatelet.kernels.choose import compiles
from gatelet.kernels.ops._declare import plain


class RowAdam(torch.optim.Optimizer):
    """Adam whose step costs only the rows with a gradient; the other rows and their moments do not change.

    For the rows that a sparse gradient g names, m ← m + (1 − β₁)(g − m), v ← v + (1 − β₂)(g² − v) and
    w ← w − η·√(1 − β₂ᵗ)/(1 − β₁ᵗ)·m/(√v + ε): the arithmetic of ``torch.optim.SparseAdam``, in one pass over memory.
    Parameters with a dense gradient take a step of torch's Adam.

    Args:
        params: parameters or groups of them. A group with ``unit_rows=True`` holds matrices whose rows keep unit
            length: the gradient's part along the row is removed, and the row is rescaled after its step.
        lr: η.
        betas: β₁, β₂.
        eps: ε.

    Raises:
        ValueError: for a rate, betas or ε outside of their ranges.
        TypeError: at the step, for a sparse gradient of a parameter that is not a matrix.

    >>> import torch
    >>> weight = torch.nn.Parameter(torch.ones(3, 2))
    >>> weight.grad = torch.sparse_coo_tensor([[1]], [[0.5, -0.5]], (3, 2), check_invariants=False)
    >>> RowAdam([weight], lr=0.1).step()
    >>> weight.detach()
    tensor([[1.0000, 1.0000],
            [0.9000, 1.1000],
            [1.0000, 1.0000]])

    Reference: D. P. Kingma, J. Ba, "Adam: A Method for Stochastic Optimization", 2014, arXiv:1412.6980.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        check_positive(lr, "lr")
        check_positive(eps, "eps")
        if not all(check_weight(beta, "betas") < 1 for beta in betas):
            raise ValueError(f"betas must lie in [0, 1), not {betas!r}")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "unit_rows": False})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step; return the closure's loss, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step(parameter, parameter.grad, group)
        return loss

    def _step(self, parameter: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        moments, (beta1, beta2) = (state["exp_avg"], state["exp_avg_sq"]), group["betas"]
        if not grad.is_sparse:
            _dense(parameter, grad, moments, state["step"], group)
            return
        if parameter.dim() != 2:
            raise TypeError(f"RowAdam takes sparse gradients of matrices, not of a parameter {tuple(parameter.shape)}")
        state["step"] += 1
        step = int(state["step"])
        rate = group["lr"] * (1 - beta2**step) ** 0.5 / (1 - beta1**step)
        rows, values = _distinct(grad)
        options = {"rate": rate, "betas": group["betas"], "eps": group["eps"], "unit": group["unit_rows"]}
        _rows(parameter, *moments, rows, values, options)


def _distinct(grad: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rows that a sparse gradient names, each once, and their values.

    Autograd marks a coalesced gradient as uncoalesced. If its rows ascend it is coalesced, and no copy is needed.
    """
    rows = grad._indices()[0]
    if not grad.is_coalesced() and bool((rows[1:] <= rows[:-1]).any()):
        grad = grad.coalesce()
    return grad._indices()[0], grad._values()


def _dense(
    parameter: Tensor, grad: Tensor, moments: tuple[Tensor, Tensor], step: Tensor, group: dict[str, Any]
) -> None:
    """Take a step of torch's Adam."""
    if group["unit_rows"]:
        along = torch.linalg.vecdot(grad, parameter) / torch.linalg.vecdot(parameter, parameter)
        grad = torch.addcmul(grad, parameter, along[:, None], value=-1)
    beta1, beta2 = group["betas"]
    options = {"amsgrad": False, "beta1": beta1, "beta2": beta2, "lr": group["lr"], "weight_decay": 0.0}
    adam([parameter], [grad], [moments[0]], [moments[1]], [], [step], **options, eps=group["eps"], maximize=False)
    if group["unit_rows"]:
        parameter.div_(torch.linalg.vector_norm(parameter, dim=1, keepdim=True))


def _rows(parameter: Tensor, mean: Tensor, square: Tensor, rows: Tensor, grad: Tensor, options: dict[str, Any]) -> None:
    """Step some rows: by the compiled kernel on a CPU, elsewhere by gathering and scattering them."""
    together = all(each.is_contiguous() for each in (parameter, mean, square, grad))
    on_cpu = parameter.device.type == "cpu" and parameter.dtype in (torch.float32, torch.float64)
    if together and on_cpu and plain(parameter, mean, square, grad) and compiles():
        from gatelet.kernels.backends.numba.row_kernels import adam_rows

        adam_rows(parameter, mean, square, rows.contiguous(), grad, **options)
        return
    w, m, v = parameter[rows], mean[rows], square[rows]
    if options["unit"]:
        along = torch.linalg.vecdot(grad, w) / torch.linalg.vecdot(w, w)
        grad = torch.addcmul(grad, w, along[:, None], value=-1)
    m.lerp_(grad, 1 - options["betas"][0])
    v.lerp_(grad * grad, 1 - options["betas"][1])
    w.addcdiv_(m, v.sqrt().add_(options["eps"]), value=-options["rate"])
    if options["unit"]:
        w.div_(torch.linalg.vector_norm(w, dim=1, keepdim=True))
    for whole, part in ((parameter, w), (mean, m), (square, v)):
        whole.index_copy_(0, rows, part)
