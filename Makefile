# Two commands do everything from nothing: `make experiments` and `make test`.
PYTHON ?= python3
VENV := .venv
# Threads that spin while they wait make a busy machine many times slower.
export OMP_WAIT_POLICY ?= PASSIVE
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: experiments test wheel compat browser notebook ray conformance architectures floors speed
.PHONY: sessions scaling calibration families campaign setup lock lowest lint typecheck format docs
.PHONY: coverage clean

# Those that need nothing beside the project; the others have targets of their own.
TESTS := tests --ignore tests/browser --ignore tests/notebook --ignore tests/on_ray

experiments: setup  ## run all experiments on the default real model; writes reports/findings.html
	$(BIN)/python -m pytest test_experiments

test: setup  ## the library's own tests, on tiny models and on the real one
	$(BIN)/python -m pytest $(TESTS)

# Tried as a stranger would: the wheel in an environment of its own, in an empty folder.
WHEEL := .wheel
MOST_BYTES := 450000

wheel: setup  ## builds the wheel, and runs a study of one's own from it
	rm -rf dist $(WHEEL)
	$(BIN)/pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir dist .
	test $$(stat -c %s dist/*.whl) -lt $(MOST_BYTES)
	$(PYTHON) -m venv $(WHEEL)
	$(call borrow,$(WHEEL))
	$(WHEEL)/bin/pip install --quiet --disable-pip-version-check --no-deps dist/*.whl
	sh tests/stranger.sh $(abspath $(WHEEL)/bin)

browser: setup  ## the report in a browser; screenshots in reports/screenshots/. TEMPO_REPORT=FILE adds one
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[browser]"
	command -v chromium || command -v chromium-browser || { apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium; }
	$(BIN)/python -m pytest tests/browser

notebook: setup  ## frames, and docs/notebook.ipynb in a fresh kernel (docs/notebook.py rewrites it)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[notebook]"
	$(BIN)/python -m pytest tests/notebook

# Ray brings a dozen packages and 200 MB: an environment of its own.
RAY := .ray

ray: setup $(RAY)/.ready  ## sessions and streams by two workers on Ray, one of which is killed
	$(RAY)/bin/python -m pytest -q tests/on_ray

$(RAY)/.ready: $(READY)
	$(PYTHON) -m venv $(RAY)
	$(call borrow,$(RAY))
	$(RAY)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[ray]"
	touch $@

conformance: setup  ## engine against oracle on the real model; writes reports/published/conformance.json
	$(BIN)/python -m benchmarks.conformance

architectures: setup  ## engine against oracle on every causal-LM architecture; rewrites tempo/architectures.json
	$(BIN)/python -m benchmarks.architectures

floors: setup  ## rounding floors of the real model in three dtypes; rewrites fixtures/floors.json
	$(BIN)/python -m benchmarks.floors

# An environment that sees the packages of the project's, but not the project itself.
define borrow
	SITE="import sysconfig; print(sysconfig.get_path('purelib'))"; \
	  $(BIN)/python -c "$$SITE" > "$$($(1)/bin/python -c "$$SITE")/project.pth"
endef

# The peers bring some forty packages, two of them pytest plugins: an environment of their own.
PEERS := .peers

speed: setup $(PEERS)/.ready  ## against transformers, nnsight, TransformerLens; writes reports/published/speed.*
	TEMPO_PEERS=1 $(PEERS)/bin/python -m pytest -q tests/test_speed.py tests/test_interpret_peers.py
	$(PEERS)/bin/python -m benchmarks.speed

$(PEERS)/.ready: $(READY)
	$(PYTHON) -m venv $(PEERS)
	$(call borrow,$(PEERS))
	$(PEERS)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[peers]"
	touch $@

# The oldest transformers that pyproject allows, and the newest; the tests run with the pinned one in between.
RELEASES := 5.0.0 5.24.0

compat: setup  ## exactness with the other transformers releases that are supported
	for release in $(RELEASES); do \
	  test -d .compat/$$release || \
	    $(BIN)/pip install --quiet --disable-pip-version-check --target .compat/$$release transformers==$$release "numpy==2.4.6" || exit 1; \
	  PYTHONPATH=.compat/$$release $(BIN)/python -m pytest -q tests/test_architectures.py tests/test_engine.py tests/test_identities.py || exit 1; \
	done

calibration: setup  ## how often verdicts are false, after make experiments; writes reports/published/calibration.json and .md
	$(BIN)/python -m benchmarks.calibration

# Writes reports/published/campaign.json and .md.
campaign: setup  ## faults at every file operation, kills, several writers; 360 random configs
	$(BIN)/python -m benchmarks.campaign

sessions: setup  ## CPU time of experiments against its floor; writes reports/published/sessions.*
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.sessions --prompts 4
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.sessions -k "not exp16"

scaling: setup  ## overhead and scaling of workers; writes reports/published/scaling.*
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.scaling

families: setup  ## every experiment on every architecture; writes reports/published/families.json and .md
	$(BIN)/python -m benchmarks.families

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

typecheck: setup
	$(BIN)/pyright

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: setup  ## the site, from docs/ and the docstrings; warnings are errors; writes docs/_build/html
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[docs]"
	rm -rf docs/_build
	$(BIN)/python -m sphinx --quiet --fail-on-warning --keep-going -b html docs docs/_build/html

coverage: setup  ## which lines of tempo the tests run; writes reports/coverage/index.html
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt "coverage>=7.10"
	$(BIN)/python -m coverage run -m pytest $(TESTS)
	$(BIN)/python -m coverage combine --quiet
	$(BIN)/python -m coverage html --quiet --directory reports/coverage
	$(BIN)/python -m coverage report

setup: $(READY)

# Every package by its hash. Where the index has no torch for the CPU, the build with CUDA is taken.
LOCKS := requirements.txt requirements-torch-cpu.txt requirements-torch-cuda.txt
FETCH := $(BIN)/pip install --quiet --disable-pip-version-check --no-deps

$(READY): pyproject.toml $(LOCKS)
	$(PYTHON) -m venv $(VENV)
	$(FETCH) --require-hashes -r requirements-torch-cpu.txt 2> /dev/null || \
	  $(FETCH) --require-hashes -r requirements-torch-cuda.txt
	$(FETCH) --require-hashes -r requirements.txt
	$(FETCH) --no-build-isolation -e .
	$(BIN)/pip check
	touch $(READY)

lock: setup  ## pins and hashes anew, and their licences; after a change of pyproject.toml or constraints.txt
	$(BIN)/python .ci/lock.py
	$(BIN)/python docs/licences.py

# The oldest versions that pyproject.toml allows, in an environment of their own.
LOWEST := .lowest

lowest: setup  ## a part of the tests with the oldest versions of what pyproject.toml asks for
	$(BIN)/uv pip compile --quiet pyproject.toml --extra test --resolution lowest-direct \
	  --python-version 3.11 --output-file $(LOWEST).txt
	$(BIN)/uv venv --quiet --allow-existing --python $(BIN)/python $(LOWEST)
	$(BIN)/uv pip install --quiet --python $(LOWEST)/bin/python -r $(LOWEST).txt
	PYTHONPATH=$(CURDIR) $(LOWEST)/bin/python -m pytest -q -p tempo.harness.plugin \
	  tests/test_spec.py tests/test_selection.py tests/test_trace.py tests/test_engine.py \
	  tests/test_metrics.py tests/test_api_inputs.py

clean:
	rm -rf $(VENV) $(PEERS) $(RAY) $(WHEEL) $(LOWEST) dist .compat results reports/findings.html
