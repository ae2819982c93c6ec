"""Units spread over two processes give the numbers of one, and each process holds half of them."""

import io
import os
import re
import socket
import subprocess
import sys
from contextlib import redirect_stdout
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import gatelet
import ranks
from gatelet.nn import ConditionalFFN, SparseAutoencoder
from gatelet.nn.spreading import _refusal
from gatelet.sparsity import AdaptiveL1, FiringRateBias, calibrate_thresholds, penalty
from machines_page import PAGE, command

FFN = {
    "straight_through": {},
    "rectifier": {"estimator": "rectifier", "gated": True, "activation": "silu"},
    "score_function": {"estimator": "score_function", "group_size": 4, "bias": False},
    "adaptive": {"sparsity": [AdaptiveL1(0.3, weight=0.1), FiringRateBias(0.6, step=0.1)]},
    "two stages": {"gater": "two_stage"},
}
SAE = {
    "top_k": {},
    "top_k of many": {"k": 24, "auxiliary_k": 30},
    "batch_top_k": {"activation": "batch_top_k"},
    "jump_relu": {"activation": "jump_relu"},
    "jump_relu, listed": {"activation": "jump_relu", "k": 1},
    "relu": {"activation": "relu", "unit_decoder": False},
    "gated": {"activation": "gated"},
}


def data(examples=48, width=12):
    return torch.randn(examples, width, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def ffn(case):
    torch.manual_seed(0)
    return ConditionalFFN(12, 80, 4, target_rate=0.3, **deepcopy(FFN[case])).double()


def sae(case):
    torch.manual_seed(0)
    made = SparseAutoencoder(12, 40, dead_after=60, **{"k": 3} | SAE[case]).double()
    made.start_from(data())
    with torch.no_grad():
        made.encoder_bias[::7] = -1.5  # seldom open: dead after two steps
    return made


def full(tensor):
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def steps_of_ffn(layer):
    """Values, gradients and state over three steps of training, then in eval()."""
    optimizer, found = torch.optim.Adam(layer.parameters(), 0.01), {}
    for step in range(3):
        torch.manual_seed(step + 1)
        x = data().requires_grad_()
        with gatelet.Tape() as tape:
            y = layer(x)
        optimizer.zero_grad()
        loss = tape.surrogate(y.square().sum(-1)).mean() + penalty(layer)
        loss.backward()
        found |= {f"y{step}": full(y), f"loss{step}": full(loss), f"x{step}": full(x.grad)}
        found |= {f"{name} {step}": full(each.grad) for name, each in layer.named_parameters()}
        optimizer.step()
    found["share"] = layer.active_fraction
    calibrate_thresholds(layer, [data()])
    layer.eval()
    with torch.no_grad():
        found["eval"] = layer(data())
        with gatelet.nn.fully_open(layer):
            found["open"] = layer(data())
    return found | {name: full(each) for name, each in layer.state_dict().items()}


def steps_of_sae(layer):
    optimizer, found = torch.optim.Adam(layer.parameters(), 0.01), {}
    for step in range(4):  # dead latents help from the third on
        optimizer.zero_grad()
        x = data().requires_grad_()
        parts = layer.loss(x)
        parts.total.backward()
        found |= {
            f"{name}{step}": full(each) for name, each in parts._asdict().items() if isinstance(each, torch.Tensor)
        }
        found |= {f"l0 {step}": parts.code.l0, f"x{step}": full(x.grad)}
        found |= {f"{name} {step}": full(each.grad) for name, each in layer.named_parameters()}
        optimizer.step()
        layer.normalise_decoder_()
    found["dead"] = torch.tensor(layer.dead)
    layer.eval()
    with torch.no_grad():
        found["code"], found["eval"] = layer.encode(data()).to_dense(), layer(data())
    return found | {name: full(each) for name, each in layer.state_dict().items()}


def held(layer):
    return sum((each.to_local() if hasattr(each, "to_local") else each).numel() for each in layer.parameters())


def program():
    """Return the program of docs/machines.md, from a start that is the same in every run."""
    (found,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    return f"import torch\ntorch.manual_seed(0)\n{found}"


def page():
    """What the program prints in this process."""
    with redirect_stdout(io.StringIO()) as told:
        exec(program(), {})
    return float(told.getvalue())


class Heard(TorchDispatchMode):
    """Notes what the processes send each other: the operator, and how many numbers."""

    def __init__(self):
        super().__init__()
        self.sent = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        if name.startswith("_c10d_functional::all"):
            self.sent.append((name.partition("::")[2], args[0].numel()))
        return func(*args, **kwargs or {})


def main(rank, folder):
    """What each of the two processes runs."""
    from torch.distributed.device_mesh import init_device_mesh

    found = {}
    ranks.join(rank, folder)
    mesh = init_device_mesh("cpu", (2,))
    for name, make, cases, steps in (("ffn", ffn, FFN, steps_of_ffn), ("sae", sae, SAE, steps_of_sae)):
        for case in cases:
            layer = make(case)
            if rank:  # the first one's numbers count
                with torch.no_grad():
                    for each in layer.parameters():
                        each.mul_(2)
            layer = gatelet.nn.spread(layer, mesh)
            torch.manual_seed(rank)
            found[name, case] = steps(layer)
    for name, layer in (("ffn", ffn("straight_through")), ("sae", sae("top_k"))):
        layer = gatelet.nn.spread(torch.nn.Sequential(layer), mesh)
        x = data().requires_grad_()
        with Heard() as heard:
            (layer(x).sum() if name == "ffn" else layer[0].loss(x).total).backward()
        found["held", name] = {"numbers": held(layer), "heard": heard.sent}
    try:
        gatelet.nn.spread(layer, mesh)
    except ValueError as error:
        found["again"] = str(error)
    torch.save(found, f"{folder}/{rank}.pt")
    ranks.leave()


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    folder = tmp_path_factory.mktemp("spread")
    further = f"import test_spread\ntest_spread.main(int(os.environ['RANK']), {str(folder)!r})\n"
    (folder / "spread.py").write_text(program() + further)
    torchrun, *words = command("torchrun --standalone --nproc-per-node 2 spread.py")
    ran = subprocess.run(
        [str(Path(sys.executable).with_name(torchrun)), *words],
        env=os.environ | ranks.ENVIRONMENT | {"PYTHONPATH": ranks.path_of(Path(__file__).parent)},
        cwd=folder,
        capture_output=True,
        timeout=480,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    found = [torch.load(folder / f"{rank}.pt") for rank in range(2)]
    numbers = re.findall(r"\d+\.\d{6}", ran.stdout)  # two processes' lines may run into one another
    return [each | {"page": float(number)} for each, number in zip(found, numbers, strict=True)]


@pytest.mark.parametrize(("name", "case"), [*(("ffn", case) for case in FFN), *(("sae", case) for case in SAE)])
def test_values_gradients_and_training_are_those_of_one_process(ran, name, case):
    whole = steps_of_ffn(ffn(case)) if name == "ffn" else steps_of_sae(sae(case))
    if case == "top_k":
        assert whole["auxiliary3"] > 0  # dead latents took part
    for each in ran:
        assert set(each[name, case]) == set(whole)
        for key, value in whole.items():
            torch.testing.assert_close(
                each[name, case][key], value, rtol=1e-5, atol=1e-9, equal_nan=True, msg=lambda s, at=key: f"{at}: {s}"
            )


def test_each_process_holds_half_of_what_belongs_to_units(ran):
    for each in ran:
        for name, layer, whole in (
            ("ffn", ffn("straight_through"), 12 * 4 + 4 + 12),  # the gater's first layer, and b2
            ("sae", sae("top_k"), 12),  # b_dec
        ):
            parts = held(layer) - whole
            assert each["held", name]["numbers"] == parts / 2 + whole


def test_a_training_step_sends_what_the_table_says(ran):
    """benchmarks/spread_traffic.py: y, ∂L/∂x, ∂L/∂h and the bottleneck's gradient are summed, logits gathered."""
    heard = ran[0]["held", "ffn"]["heard"]
    sums = sorted(count for name, count in heard if name == "all_reduce")
    assert sums == sorted([48 * 12, 48 * 12, 48 * 80, 48 * 4])
    assert [count for name, count in heard if name == "all_gather_into_tensor"] == [48 * 80 // 2]


def test_a_step_of_an_autoencoder_sends_what_the_table_says(ran):
    """benchmarks/spread_traffic.py: x̂ and ∂L/∂x̄ are summed; gathered are the k largest, and the code."""
    for each in ran:
        heard = each["held", "sae"]["heard"]
        assert [count for name, count in heard if name == "all_reduce"] == [48 * 12, 48 * 12]
        largest, counts, pairs, values = (count for name, count in heard if name == "all_gather_into_tensor")
        assert (largest, counts) == (48 * 3, 1)
        assert pairs == 2 * values
        assert 48 * 3 / 2 <= values <= 48 * 3  # padded to the process with most


def test_the_program_of_the_page_prints_the_same_in_one_and_two_processes(ran, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    alone = {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "GLOO_SOCKET_IFNAME": "lo",
    }
    for key, value in alone.items():
        monkeypatch.setenv(key, value)
    assert [each["page"] for each in ran] == pytest.approx([page()] * 2, rel=1e-5)


def test_a_layer_is_spread_once(ran):
    assert "is spread already" in ran[0]["again"]


BAD = {
    "gates": (lambda: ffn("straight_through"), 3, "80 gates cannot be divided among 3 processes"),
    "gates of groups": (lambda: ffn("score_function"), 8, "20 gates cannot be divided among 8"),
    "latents": (lambda: sae("top_k"), 7, "40 latents cannot be divided among 7"),
    "self": (lambda: ConditionalFFN(12, 80, gater="self"), 2, "decides by the units themselves"),
    "dropout": (lambda: ConditionalFFN(12, 80, 4, dropout=0.1), 2, "dropout"),
    "groups": (lambda: SparseAutoencoder(12, 40, k=3, groups=2), 2, "groups"),
    "sparse gradients": (lambda: SparseAutoencoder(12, 40, k=3, sparse_grad=True), 2, "sparse_grad"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_spread_is_told(case):
    make, processes, words = BAD[case]
    assert words in _refusal(make(), processes)


def test_a_hooked_linear_is_told():
    layer = ffn("straight_through")
    layer.up.register_forward_hook(lambda *_: None)
    assert "up: only affine maps are spread, and it has hooks" in _refusal(layer, 2)
