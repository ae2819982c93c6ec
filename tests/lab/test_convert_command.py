"""gatelet convert, on a tiny model: what it writes, that it resumes, what it refuses."""

import io
import json
import sys
from types import SimpleNamespace

import pytest
import torch
import transformers
import tyro
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import gatelet
from gatelet.convert import keep_rows
from gatelet_lab.commands import convert
from gatelet_lab.commands.convert import Convert
from gatelet_lab.language import decoding, load_language, perplexity, read_text

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A model of two blocks, with a byte tokenizer, and text."""
    home = tmp_path_factory.mktemp("language")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(home / "model")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=256, max_position_embeddings=256, **sizes)
    transformers.LlamaForCausalLM(config).save_pretrained(home / "model")
    (home / "text").mkdir()
    for index in range(6):
        (home / "text" / f"{index}.txt").write_text(f"the {index}th text says what the others say too. " * 40)
    return home


def options(home, out, **changes):
    given = {"gater": "mlp", "rate": 0.4, "bottleneck": 4, "steps": 4, "tokens": 2048, "held_out": 512, "length": 64}
    return Convert(home / "model", ((str(home / "text" / "*.txt"),),), out, **given | changes)


def run(asked):
    stream = io.StringIO()
    convert.run(asked, Console(file=stream, width=200))
    return stream.getvalue()


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_bars_are_for_terminals(home, tmp_path, monkeypatch, capfd, terminal):
    logging = transformers.utils.logging
    logging.enable_progress_bar()
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    load_language(home / "model").model.save_pretrained(tmp_path / "out")
    assert ("it/s" in capfd.readouterr().err) == terminal


@pytest.mark.parametrize(
    ("gater", "weights"), [("mlp", "float32"), ("two_stage", "bf16"), ("self", "int8"), ("preview", "float32")]
)
def test_writes_a_model_that_loads_and_a_report(home, tmp_path, gater, weights):
    shown = run(options(home, tmp_path / "out", gater=gater, weights=weights))
    assert "converted 2, left 0" in shown
    again = load_language(tmp_path / "out")
    assert {type(layer.mlp).__name__ for layer in again.model.model.layers} == {"ConditionalLlamaMLP"}
    text = read_text(again.tokenizer, [str(home / "text" / "*.txt")], 64, 2048, 512)
    report = (tmp_path / "out" / "report.md").read_text()
    assert f"| with gates | {perplexity(again.model, text.held_out):.2f} (" in report
    assert f"| dense | {perplexity(load_language(home / 'model').model, text.held_out):.2f} |" in report
    kept = keep_rows(gatelet.load(tmp_path / "out"), weights, rest=True)
    assert f"| with gates, rows kept to decode, {weights} | {perplexity(kept, text.held_out):.2f} (" in report
    kept = keep_rows(load_language(home / "model").model, weights, rest=True)
    assert f"| all units open, rows kept to decode, {weights} | {perplexity(kept, text.held_out):.2f} (" in report
    assert (
        f"To decode: `from gatelet.convert import keep_rows; keep_rows(gatelet.load('out'), '{weights}', rest=True)`."
        in report
    )
    assert report.count("| model.layers.") == 2
    assert (tmp_path / "out" / "report.png").stat().st_size > 1000
    assert not (tmp_path / "out" / "distil.pt").exists()


def test_the_rate_is_spread_over_the_blocks(home, tmp_path):
    run(options(home, tmp_path / "out", gater="preview", spread=True))
    rates = [layer.mlp.gating.unit.target_rate for layer in gatelet.load(tmp_path / "out").model.layers]
    assert rates[0] != rates[1]
    assert sum(rates) / 2 == pytest.approx(0.4, abs=0.01)
    assert "40% open on average" in (tmp_path / "out" / "report.md").read_text()
    with pytest.raises(ValueError, match="spread: spreads the rate over all blocks; leave where out"):
        options(home, tmp_path / "out", spread=True, where="*.0*")


def test_resumes(home, tmp_path, monkeypatch):
    asked = options(home, tmp_path / "out")
    with monkeypatch.context() as patched:
        patched.setattr(convert, "perplexity", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(asked)
    with pytest.raises(ValueError, match="out: an interrupted run left its checkpoint there; --resume"):
        run(asked)
    with pytest.raises(ValueError, match=r"rate: was 0.4 and is 0.3; a resumed run keeps it"):
        run(options(home, tmp_path / "out", rate=0.3, resume=True))
    seen = []
    made = gatelet.distil
    monkeypatch.setattr(gatelet, "distil", lambda *args, **named: seen.append(made(*args, **named)) or seen[0])
    run(options(home, tmp_path / "out", resume=True))
    assert seen[0].steps == 4
    assert (tmp_path / "out" / "report.md").exists()


def test_nothing_to_resume(home, tmp_path):
    with pytest.raises(ValueError, match="resume: no run was begun in "):
        run(options(home, tmp_path, resume=True))


def test_a_run_that_had_saved_nothing_begins_anew_and_one_that_ended_does_not_resume(home, tmp_path, monkeypatch):
    asked = {"gater": "preview", "steps": 1}
    with monkeypatch.context() as patched:
        patched.setattr(convert, "fit", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(options(home, tmp_path / "out", **asked))
    assert "nothing had been saved yet: it begins anew" in run(options(home, tmp_path / "out", resume=True, **asked))
    with pytest.raises(ValueError, match=r"resume: the run in .*out has ended; its report is .*report.md"):
        run(options(home, tmp_path / "out", resume=True, **asked))


def test_weights_learn_and_resume(home, tmp_path, monkeypatch):
    asked = {"gater": "preview", "fit_weights": True, "steps": 8}
    with monkeypatch.context() as patched:
        patched.setattr(convert, "perplexity", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(options(home, tmp_path / "out", **asked))
    assert (tmp_path / "out" / "output.pt").exists()
    seen = []
    made = convert.distil_output
    monkeypatch.setattr(convert, "distil_output", lambda *args, **named: seen.append(made(*args, **named)) or seen[0])
    shown = run(options(home, tmp_path / "out", resume=True, **asked))
    assert seen[0].steps == 8
    before, after = seen[0].first_errors["output"], seen[0].errors["output"]
    assert after < before
    assert f"divergence from the dense model's output {before:.4f} → {after:.4f}." in shown
    assert not (tmp_path / "out" / "output.pt").exists()


def test_the_report_says_when_training_brought_nothing():
    said = convert._what_weights_learned(SimpleNamespace(errors={"output": (0.061, 0.061)}))
    assert (
        said[1] == "The blocks' weights are as they were: no step came nearer to the dense model's output than 0.0610."
    )


def test_bad_models(home, tmp_path):
    with pytest.raises(ValueError, match=r"model: .* does not exist"):
        load_language(tmp_path / "none")
    (tmp_path / "weights.bin").write_bytes(b"0")
    with pytest.raises(ValueError, match=r"is neither a Hugging Face directory nor a .gguf file"):
        load_language(tmp_path / "weights.bin")
    with pytest.raises(ValueError, match="model: transformers cannot load"):
        load_language(home / "text")


def test_a_gguf_file_of_an_unknown_architecture(tmp_path):
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "odd.gguf", "nonsense")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match=r"model: transformers cannot load .*odd.gguf.*nonsense"):
        load_language(tmp_path / "odd.gguf")


def test_bad_text(home, tmp_path):
    tokenizer = load_language(home / "model").tokenizer
    with pytest.raises(ValueError, match="names 0 files; two are needed"):
        read_text(tokenizer, [str(tmp_path / "*.txt")], 64, 100, 100)
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text("")
    with pytest.raises(ValueError, match="text: the files held out yield 0 tokens, not one window of 64"):
        read_text(tokenizer, [str(tmp_path / "*.txt")], 64, 100, 100)


def test_text_may_be_files_that_a_shell_lists_and_globs():
    asked = tyro.cli(Convert, args=["m", "--text", "a.py", "b.py", "--text", "c/*.py", "--out", "o"])
    assert asked.text == (("a.py", "b.py"), ("c/*.py",))


def test_bad_input_is_refused_before_anything_is_written(home, tmp_path):
    with pytest.raises(ValueError, match="text: give files to fit and to measure on"):
        Convert(home / "model", ((),), tmp_path / "out")
    with pytest.raises(ValueError, match=r"rate must lie strictly between 0 and 1, not 1.5"):
        options(home, tmp_path / "out", rate=1.5)
    with pytest.raises(ValueError, match="steps must be an integer of at least 1, not 0"):
        options(home, tmp_path / "out", steps=0)
    with pytest.raises(ValueError, match="names 0 files"):
        run(Convert(home / "model", ((str(tmp_path / "*.txt"),),), tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_directory_of_another_version(home, tmp_path):
    run(options(home, tmp_path / "out", gater="preview", steps=1))
    path = tmp_path / "out" / "gatelet.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 99}))
    with pytest.raises(ValueError, match=r"format 99; this is gatelet .*, which reads format"):
        gatelet.load(tmp_path / "out")
    config = tmp_path / "out" / "config.json"
    about = json.loads(config.read_text())
    about["quantization_config"]["format"] = 99
    config.write_text(json.dumps(about))
    with pytest.raises(ValueError, match=r"model: transformers cannot load .*format 99"):
        load_language(tmp_path / "out")


def test_a_rate_that_saves_nothing(home, tmp_path):
    with pytest.raises(ValueError, match=r"gater: it costs .* but closing 10% .* saves only"):
        run(options(home, tmp_path / "out", rate=0.9, bottleneck=64))


def test_files_are_disjoint_and_windows_whole(home):
    tokenizer = load_language(home / "model").tokenizer
    text = read_text(tokenizer, [str(home / "text" / "*.txt")], 50, 5000, 1000)
    assert text.fit.shape == (100, 50)
    assert text.held_out.shape == (20, 50)
    assert text.files == (3, 1) or sum(text.files) <= 6


def test_decoding_times_every_model_in_turns(home):
    calls = []
    model = load_language(home / "model").model
    model.register_forward_pre_hook(lambda *args: calls.append(1))
    found = decoding({"one": model, "two": model}, torch.randint(256, (1, 8)), new=3, turns=2)
    assert set(found) == {"one", "two"}
    assert all(each > 0 for each in found.values())
    assert len(calls) == 2 * (1 + 2 + 2 * (1 + 3))
