"""`gatelet train sae` on a tiny model: cache, resuming, processes, refusals, report and page (in a real browser)."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

import gatelet
from gatelet.nn import load_sae_lens
from gatelet_lab.commands import train_sae as command
from gatelet_lab.data import DataError
from gatelet_lab.files import CheckpointError
from gatelet_lab.sae import activations, report
from gatelet_lab.sae.training import SAETrainer

QUIET = Console(quiet=True)
WORDS = [
    "the",
    "a",
    "cat",
    "dog",
    "tree",
    "house",
    "runs",
    "sees",
    "finds",
    "old",
    "red",
    "big",
    "and",
    "or",
    "not",
    "why",
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A directory with a two-layer Llama and a tokenizer of words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("model")
    vocabulary = {word: index for index, word in enumerate(["<unk>", "<end>", *WORDS])}
    inner = Tokenizer(models.WordLevel(vocabulary, "<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token="<end>")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(vocabulary), **sizes)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Ten files of words in random order."""
    folder = tmp_path_factory.mktemp("text")
    draw = torch.Generator().manual_seed(1)
    for index in range(10):
        words = torch.randint(len(WORDS), (400,), generator=draw)
        (folder / f"{index}.txt").write_text(" ".join(WORDS[i] for i in words.tolist()))
    return folder


@pytest.fixture
def options(model, text, tmp_path):
    return command.TrainSAE(
        model,
        layer=1,
        text=(f"{text}/*.txt",),
        latents=64,
        k=4,
        tokens=64 * 20,
        collect=2048,
        context=32,
        batch=64,
        every=5,
        test=128,
        warm_up=3,
        shown=10,
        out=tmp_path / "out",
    )


@pytest.fixture(scope="module")
def finished(model, text, tmp_path_factory):
    """A finished run, and what it printed."""
    out = tmp_path_factory.mktemp("sae") / "out"
    sizes = {"latents": 64, "k": 4, "tokens": 64 * 30, "collect": 2048, "context": 32, "batch": 64, "shown": 10}
    options = command.TrainSAE(model, layer=1, text=(f"{text}/*.txt",), every=10, test=128, warm_up=3, out=out, **sizes)
    with Console(width=200, force_terminal=False, record=True) as console:
        command.run(options, console)
    return options, console.export_text()


def test_a_run_writes_report_page_pictures_and_an_autoencoder_that_can_be_read(finished):
    options, printed = finished
    told = json.loads((options.out / "report.json").read_text())
    assert re.search(r"explained variance 0\.\d+, L0 \d", printed)
    assert 0 < told["explained"] < 1
    assert told["history"][-1]["step"] == 30
    assert told["history"][-1]["explained"] > told["history"][0]["explained"]
    assert [Path(each).name for each in told["held_out_files"]] == ["9.txt"]
    assert len(told["frequencies"]) == 64
    assert sum(told["frequencies"]) == pytest.approx(4, rel=0.2)
    for name in ("curves.png", "histogram.png"):
        assert (options.out / name).read_bytes().startswith(b"\x89PNG")
    assert list((options.out / "tensorboard").iterdir())
    sae = load_sae_lens(options.out / "sae")
    assert (
        json.loads((options.out / "sae" / "cfg.json").read_text())["metadata"]["hook_name"]
        == "blocks.0.hook_resid_post"
    )
    held = activations.Cache(options.out / "activations" / "held-out").rows.float()
    left = (sae(held) - held).square().sum() / (held - held.mean(0)).square().sum()
    assert 1 - left.item() == pytest.approx(told["explained"], abs=1e-4)


def test_the_losses_are_those_of_the_model_with_its_stream_replaced(finished, model):
    options, _ = finished
    source = activations.load_model(model)
    sae = load_sae_lens(options.out / "sae").eval()
    tokens = torch.randint(2, 10, (3, 12))
    changes = (None, torch.zeros_like, sae)
    clean, zero, spliced = report.losses(source, 1, tokens, 1e9, changes)
    logits = source.model(tokens).logits
    wanted = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert clean == pytest.approx(wanted.item(), rel=1e-5)
    assert len({round(each, 6) for each in (clean, zero, spliced)}) == 3
    rows = sae(source.residual(tokens, 1)[:, activations.SKIPPED :])
    assert report.losses(source, 1, tokens, 1e9, [report.in_turn(rows)]) == pytest.approx([spliced], rel=1e-5)
    kept = report.losses(source, 1, tokens, 0.0, changes)  # every row counts as too long: nothing is replaced
    assert kept == pytest.approx([clean] * 3)


def test_cached_rows_are_the_layers_output_and_an_interrupted_collection_continues(model, text, tmp_path, monkeypatch):
    source = activations.load_model(model)
    files = sorted(text.glob("*.txt"))
    tokens = activations.contexts(source, files, 16, 70, seed=0)
    seen = source.model(tokens, output_hidden_states=True).hidden_states[1][:, 1:].flatten(0, 1)
    calls, whole = [], activations.Source.residual

    def failing(self, part, layer):
        calls.append(len(part))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return whole(self, part, layer)

    monkeypatch.setattr(activations.Source, "residual", failing)
    with pytest.raises(KeyboardInterrupt):
        activations.collect(source, tokens, 1, tmp_path)
    cache = activations.collect(source, tokens, 1, tmp_path)
    assert calls == [32, 32, 32, 6]
    torch.testing.assert_close(cache.rows.float(), seen, rtol=1e-2, atol=1e-2)
    assert torch.equal(cache.tokens, tokens)
    calls.clear()
    activations.collect(source, tokens, 1, tmp_path)
    assert not calls
    with pytest.raises(DataError, match=r"--cache .* holds activations of another layer"):
        activations.collect(source, tokens, 2, tmp_path)
    with pytest.raises(DataError, match=r"another tokens"):
        activations.collect(source, tokens.flip(0), 1, tmp_path)
    (tmp_path / "cache.json").write_text("{")
    with pytest.raises(DataError, match=r"--cache .* cannot be read"):
        activations.collect(source, tokens, 1, tmp_path)


def test_nan_stops_the_collection_and_keeps_what_was_before(model, text, tmp_path, monkeypatch):
    source = activations.load_model(model)
    tokens = activations.contexts(source, sorted(text.glob("*.txt")), 16, 40, seed=0)
    whole = activations.Source.residual

    def broken(self, part, layer):
        found = whole(self, part, layer)
        return found * torch.nan if len(part) < 32 else found

    monkeypatch.setattr(activations.Source, "residual", broken)
    with pytest.raises(RuntimeError, match=r"layer 1 of .* gives NaN or infinity at context 32"):
        activations.collect(source, tokens, 1, tmp_path)
    assert activations.Cache(tmp_path).done == 32


def test_no_held_out_text_is_trained_on(tmp_path):
    for index in range(6):
        (tmp_path / f"{index}.txt").write_text(f"text {index % 5}")  # the last equals the first
    (tmp_path / "7.txt").symlink_to(tmp_path / "1.txt")
    found = activations.find_text([f"{tmp_path}/*.txt"], [f"{tmp_path}/[01].txt"])
    assert [file.name for file in found.held_out] == ["0.txt", "1.txt"]
    assert [file.name for file in found.training] == ["2.txt", "3.txt", "4.txt"]


def test_rows_that_are_far_too_long_are_left_out(model, text, tmp_path):
    source = activations.load_model(model)
    cache = activations.collect(source, activations.contexts(source, sorted(text.glob("*")), 16, 40, 0), 1, tmp_path)
    assert not len(cache.long)
    raw = torch.from_file(str(tmp_path / "activations.bin"), shared=True, size=cache.rows.numel(), dtype=torch.bfloat16)
    raw.view_as(cache.rows)[17] *= 1000
    again = activations.Cache(tmp_path)
    assert again.long.tolist() == [17]
    assert torch.equal(again.rows, cache.rows[[*range(17), 16, *range(18, len(cache.rows))]])


def test_batches_take_each_row_at_most_once_per_pass_and_start_anywhere(finished):
    options, _ = finished
    cache = activations.Cache(options.out / "activations" / "training")
    cache.rows[:, 0] = torch.arange(len(cache.rows)) % 256  # bfloat16 tells 256 whole numbers apart
    runs = len(cache.rows) // 256 // 2 * 2  # a buffer holds two
    stream = cache.batches(64, seed=3, buffer=512)
    first = [next(stream) for _ in range(3 * 4 * runs)]
    once = torch.cat(first[: 4 * runs])[:, 0]
    counts = once.long().bincount(minlength=256)
    assert counts.sum() == 256 * runs
    assert counts.max() <= cache.rows[:, 0].long().bincount(minlength=256).max()
    assert not torch.equal(first[0], first[4 * runs])
    for start in (1, 5, 4 * runs + 3):
        assert torch.equal(next(cache.batches(64, seed=3, start=start, buffer=512)), first[start])
    with pytest.raises(ValueError, match="--batch"):
        next(cache.batches(10**6, seed=0))


def test_a_resumed_run_gives_the_numbers_of_an_uninterrupted_one(options, tmp_path, monkeypatch):
    whole = replace(options, out=tmp_path / "whole", cache=tmp_path / "cache")
    command.run(whole, QUIET)
    halved = replace(whole, out=tmp_path / "halved")
    step, count = SAETrainer.step, 0

    def interrupted(self, x):
        nonlocal count
        count += 1
        if count == 13:
            raise KeyboardInterrupt
        step(self, x)

    monkeypatch.setattr(SAETrainer, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        command.run(halved, QUIET)
    with pytest.raises(ValueError, match=r"--out .* is not empty"):
        command.run(halved, QUIET)
    with pytest.raises(ValueError, match="holds a run of k 4, not 5"):
        command.run(replace(halved, k=5, resume=True), QUIET)
    command.run(replace(halved, resume=True), QUIET)
    first, second = (
        torch.load(each.out / "checkpoints" / "sae.pt", weights_only=True)["sae"] for each in (whole, halved)
    )
    for key, value in first.items():
        assert torch.equal(second[key], value), key


def test_a_checkpoint_of_another_setting_is_refused(finished):
    options, _ = finished
    cache = activations.Cache(options.out / "activations" / "training")
    path = options.out / "checkpoints" / "sae.pt"
    with pytest.raises(CheckpointError, match=r"belongs to another run: k was '4', is '3'"):
        SAETrainer(replace(options, k=3), cache).load(path)
    with pytest.raises(CheckpointError, match="belongs to another run: activations"):
        SAETrainer(options, activations.Cache(options.out / "activations" / "held-out")).load(path)


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_checkpoint(options, monkeypatch):
    batches = activations.Cache.batches

    def broken(self, *args, **settings):
        for index, batch in enumerate(batches(self, *args, **settings)):
            yield batch * 1e30 if index == 7 else batch

    monkeypatch.setattr(activations.Cache, "batches", broken)
    with pytest.raises(FloatingPointError, match="training diverged: the loss became inf in step 8"):
        command.run(options, QUIET)
    assert torch.load(options.out / "checkpoints" / "sae.pt", weights_only=True)["steps"] == 5


@pytest.mark.parametrize("activation", ["batch_top_k", "jump_relu", "relu", "gated"])
def test_every_activation_goes_the_whole_way(options, activation):
    command.run(replace(options, activation=activation, tokens=64 * 6), QUIET)
    assert (options.out / "report.html").is_file()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"layer": 3}, "--layer 3: .* has the layers 1 to 2"),
        ({"k": 65}, "--k 65: more than the 64 latents"),
        ({"model": Path("nowhere")}, "--model nowhere: there is no such file"),
        ({"text": ("nothing/*.txt",)}, r"--text nothing/\*.txt: matches no file"),
        ({"context": 100_000}, "--text: .* too short a text"),
        ({"tokens": 10}, "--tokens 10: are less than a --batch"),
        ({"latents": 0}, "--latents must be an integer"),
        ({"rate": -1.0}, "--rate must be"),
        ({"groups": 3}, "groups must divide d_sae"),
    ],
)
def test_bad_options_are_refused_by_name(options, change, told):
    with pytest.raises(ValueError, match=told):
        command.run(replace(options, **change), QUIET)


def test_two_processes_give_the_numbers_of_one(options, tmp_path):
    """Under torchrun, with the activations collected by the first of them."""
    one = replace(options, out=tmp_path / "one", cache=tmp_path / "cache")
    command.run(one, QUIET)
    arguments = [
        "--model",
        one.model,
        "--layer",
        1,
        "--text",
        *one.text,
        "--latents",
        64,
        "--k",
        4,
        "--tokens",
        one.tokens,
    ]
    arguments += ["--collect", one.collect, "--context", 32, "--batch", 64, "--every", 5, "--test", 128, "--warm-up", 3]
    arguments += ["--out", tmp_path / "two", "--cache", tmp_path / "cache2", "--shown", 10]
    code = "import sys; from gatelet_lab.cli import main; sys.argv[1:1] = ['train', 'sae']; main()"
    script = tmp_path / "run.py"
    script.write_text(code)
    found = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            script,
            *map(str, arguments),
        ],
        env=os.environ | {"PYTHONPATH": str(Path(gatelet.__file__).parents[1]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert found.returncode == 0, found.stderr[-2000:]
    first, second = (
        torch.load(tmp_path / each / "checkpoints" / "sae.pt", weights_only=True)["sae"] for each in ("one", "two")
    )
    for key, value in first.items():
        torch.testing.assert_close(second[key], value, rtol=1e-5, atol=1e-5, msg=lambda text, key=key: key + text)


# -------------------------------------------------------------------- the page

NAMES = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next((found for name in NAMES if (found := shutil.which(name))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="there is no Chromium on this machine to open the page in")


def opened(page, folder, *arguments):
    """What the browser made of the page."""
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder}"]
    command += ["--virtual-time-budget=3000", *arguments, page]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=True).stdout


@needs_browser
def test_the_browser_shows_numbers_curves_and_coloured_contexts_and_searches_them(finished, tmp_path):
    options, _ = finished
    page = (options.out / "report.html").absolute().as_uri()
    shown = opened(page, tmp_path, "--dump-dom")
    assert "data-error" not in shown
    told = json.loads((options.out / "report.json").read_text())
    text = re.sub(r"<script.*?</script>", "", shown, flags=re.DOTALL)
    assert f"{100 * told['explained']:.1f} %" in text
    assert text.count('class="line"') == 4
    assert text.count('class="bar"') == 30
    assert text.count('class="latent"') == 10
    assert "rgba(var(--glow)" in text
    assert text.count('class="peak"') >= 10
    number = re.search(r"<b>#(\d+)</b>", text)[1]
    assert 'data-found="1"' in opened(f"{page}#search=%23{number}", tmp_path, "--dump-dom")
    assert 'data-found="0"' in opened(f"{page}#search=zebra", tmp_path, "--dump-dom")
    by_word = int(re.search(r'data-found="(\d+)"', opened(f"{page}#search=house", tmp_path, "--dump-dom"))[1])
    assert 0 < by_word <= 10


def test_a_sentence_that_stands_in_two_files_is_shown_once():
    source = SimpleNamespace(tokenizer=SimpleNamespace(decode=str))
    tokens = torch.tensor([[0, 1, 2, 3], [0, 1, 2, 3], [0, 4, 5, 6]])
    found = report.Seen(source, tokens, 9).told(torch.tensor([1, 4, 7]), torch.tensor([0.5, 0.7, 0.6]))
    assert [each["tokens"] for each in found["contexts"]] == [
        [f"[{i}]" for i in row] for row in tokens[[1, 2]].tolist()
    ]


def test_the_page_needs_no_network_and_text_cannot_end_its_data(finished):
    options, _ = finished
    text = (options.out / "report.html").read_text()
    assert not re.search(r"(src|href)\s*=|@import|url\(|fetch\(", text)
    told = json.loads((options.out / "report.json").read_text())
    told["latents"] = [
        {
            "id": 0,
            "frequency": 0.1,
            "strongest": 1.0,
            "contexts": [{"tokens": ["</script><b>"], "values": [1.0], "peak": 0}],
        }
    ]
    assert report.page(told).count("</script>") == 2
