# Every target builds its own environment in .venv on first use and reuses it afterwards.
PYTHON ?= python3
VENV   ?= .venv
BIN     = $(VENV)/bin
READY   = $(VENV)/.ready
ARGS   ?=
TORCH   = torch==2.13.0

.PHONY: reproduce test lint format docs release clean

reproduce: $(READY)  ## train the seven rows of the paper's table and show them beside the paper's; again: continue
	$(BIN)/gatelet reproduce --resume $(ARGS)

test: $(READY)       ## the whole test-suite: tests, doctests, the README's code
	$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

lint: $(READY)       ## formatting, lint, types, one-way imports
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(READY)       ## the documentation as a site in site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "docs: open site/index.html"

# The wheel is installed into an environment of its own, and tried from a directory that holds nothing of the checkout.
release: $(READY)    ## sdist and wheel in dist/, checked and tried; nothing is uploaded
	rm -rf dist build/release && mkdir -p build/release/empty
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[release]"
	$(BIN)/python -m build --outdir dist
	$(BIN)/twine check --strict dist/*
	$(PYTHON) -m venv build/release/venv
	build/release/venv/bin/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	build/release/venv/bin/python -m pip install --quiet --disable-pip-version-check "$$(echo dist/*.whl)[lab]"
	cd build/release/empty && ../venv/bin/python -I "$(CURDIR)/.ci/smoke.py" "$(CURDIR)"
	@echo "release: dist/ is ready"

# torch is pinned first and alone: with it in place nothing else pulls another build (a bare "torch" or an
# open range would fetch gigabytes of CUDA). pip takes a CPU build (2.13.0+cpu) where the machine offers one.
$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("gatelet needs Python 3.11 or newer, and $(PYTHON) is " + sys.version.split()[0] + "; call make with PYTHON=/path/to/python3") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[dev]"
	@touch $@

clean:
	rm -rf $(VENV) site build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
