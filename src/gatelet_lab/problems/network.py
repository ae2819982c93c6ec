"""The paper's conditional network at its start, on a batch of images."""

import torch
from rich.console import Console

from gatelet.diagnose import diagnose_model
from gatelet_lab import data
from gatelet_lab.problems.options import Diagnose, head, show, write_file
from gatelet_lab.training import recipes
from gatelet_lab.training.model import PaperNet


def run(options: Diagnose, console: Console) -> str:
    """Diagnose the conditional layer on a batch."""
    split = data.load(options.dataset, options.data_dir)
    torch.manual_seed(options.seed)
    recipe = recipes.straight_through().but(
        experts=options.experts,
        bottleneck=options.bottleneck,
        input_dropout=0.0,  # other noise would count as variance of every estimator
        hidden_dropout=0.0,
    )
    model = PaperNet(recipe, split.train_images.shape[1], split.classes)
    batch = split.train_images[: options.batch], split.train_labels[: options.batch]
    report = diagnose_model(
        model,
        torch.nn.CrossEntropyLoss(reduction="none"),
        batch,
        options.estimators or None,
        options.samples or 200,
        options.budget,
        seed=options.seed,
    )
    if options.plot is not None:
        write_file(options.plot, "--plot", report.plot)
    title = f"{split.name}, {options.experts} experts, bottleneck {options.bottleneck}, {len(batch[0])} examples"
    return head(options) + show(console, title, report)
