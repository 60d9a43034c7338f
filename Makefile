# `make demo` and `make test` do all the set-up they need; nothing has to be installed by hand.
PYTHON ?= python3
BIN := .venv/bin
ARGS ?= tests
# More than there are cores: a test that waits for something leaves its core to another.
WORKERS ?= 3
READY := .venv/.ready
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(WORKERS) --durations 10

.PHONY: setup demo test test-cluster drills soak check bench lock clean

setup: $(READY)

# Exact versions and hashes from the lock file; the package itself is installed editable. Compiled now, as where
# Python may not write bytecode (PYTHONDONTWRITEBYTECODE, usual in containers) each process compiled all of it again.
$(READY): requirements.lock pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==0.13.8
	$(BIN)/uv pip install --python $(BIN)/python --compile-bytecode --require-hashes --requirement requirements.lock
	$(BIN)/uv pip install --python $(BIN)/python --no-deps --no-build-isolation --editable .
	$(BIN)/python -m compileall -q data_pipeline pretrain launch tests
	touch $@

demo: $(READY)
	$(BIN)/pretrain demo

# What is collected, its time budget and what is printed at the end: tests/tiers.py. A part: make test ARGS=tests/objectives
test: $(READY)
	$(PYTEST) --tier test --dist loadfile --no-loadscope-reorder $(ARGS)

# On a real SLURM cluster and in a real browser. Test by test, longest first, each worker with a cluster of its own.
test-cluster: $(READY)
	$(PYTEST) --tier test-cluster --dist loadgroup --no-loadscope-reorder $(ARGS)

# The long ones: runs killed in every phase, storage and networks that fail, every byte of a shard damaged. In the order of
# their names: by default files of few tests come last, which here are the longest.
drills: $(READY)
	$(PYTEST) --tier drills --dist loadfile --no-loadscope-reorder $(ARGS)

# An hour, by hand: tests/soak/README.md. Shorter: make soak ARGS="--minutes 10 --kill-every 1"
soak: $(READY)
	$(BIN)/python -m tests.soak $(if $(filter command line environment,$(origin ARGS)),$(ARGS))

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)
	$(BIN)/python -m tests.benchmarks

# After a change of pyproject.toml's ranges.
lock: $(READY)
	$(BIN)/uv pip compile --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
	    --extra dev pyproject.toml --output-file requirements.lock

clean:
	rm -rf .venv runs build *.egg-info
