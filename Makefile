# Everything runs from .venv, installed from the exact lock. `make quickstart`, `make test`, `make lint`.
PYTHON ?= python3
RUN := runs/quickstart
PRESET := quickstart
# More flags for the data and the training of every stage, such as --config.seed=1.
FLAGS :=
UNIVG := .venv/bin/univg
CONFIG := experiments/emoji.py
comma := ,
export JAX_PLATFORMS ?= cpu
# XLA's temporaries are mapped and unmapped every step; in huge pages that is 27 times fewer page faults.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

.PHONY: install quickstart demo ablations test parity datasets docs lint lock clean

install: .venv/installed

.venv/installed: requirements.lock setup.cfg pyproject.toml
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --disable-pip-version-check --no-deps -r requirements.lock
	.venv/bin/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

# The commands of a real run, in order. Each continues where it was or says that it is done. The prompts of a stage are
# embedded before it begins, each once: the text encoder would take a third of every step.
define stage
	test -e $(RUN)/text$(1)/cache.json || \
	$(UNIVG) data cache --config=$(CONFIG):stage=$(1),preset=$(PRESET)$(2) $(FLAGS) --out=$(RUN)/text$(1)
	$(UNIVG) train --config=$(CONFIG):stage=$(1),preset=$(PRESET)$(2) $(FLAGS) \
	  --config.data.text_cache=$(RUN)/text$(1) --workdir=$(RUN)/stage$(1)
endef

quickstart: install
	$(call stage,1,)
	$(call stage,2,$(comma)init_from=$(RUN)/stage1)
	$(call stage,3,$(comma)init_from=$(RUN)/stage2)
	$(UNIVG) evaluate --checkpoint=$(RUN)/stage3 --benchmark=emoji_scenes --out=$(RUN)/evaluation
	$(UNIVG) report --stages=$(RUN)/stage1,$(RUN)/stage2,$(RUN)/stage3 --evaluation=$(RUN)/evaluation --out=$(RUN)
	@echo "To have the command in this shell: source .venv/bin/activate; univg --help"

# A page to try the run's model in a browser; makes the run first if it is not there.
demo: install
	ls $(RUN)/stage3/checkpoints/* > /dev/null 2>&1 || $(MAKE) quickstart
	$(UNIVG) demo --checkpoint=$(RUN)/stage3

# The paper's ablations, at most 8 hours on 2 cores; killed, it goes on. Writes docs/ablations.md.
ablations: install
	.venv/bin/python -m tools.ablations

test: install
	.venv/bin/python -m pytest -n auto

# Every network against PyTorch, diffusers and transformers, which only this environment has; writes docs/parity.md.
parity: .venv-parity/installed
	.venv-parity/bin/python tools/parity.py

.venv-parity/installed: requirements.lock requirements-parity.lock
	$(PYTHON) -m venv .venv-parity
	.venv-parity/bin/pip install --quiet --disable-pip-version-check --no-deps -r requirements.lock -r requirements-parity.lock
	.venv-parity/bin/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

# Every dataset of the recipe in miniature, from its native files to trained steps.
datasets: install
	.venv/bin/python -m tools.datasets runs/datasets

# The documentation site, build/docs/index.html; warnings, such as a link to nowhere, are errors.
docs: install
	.venv/bin/python -m sphinx -b html --quiet --fail-on-warning --keep-going docs build/docs

lint: install
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

# Resolves the newest versions that setup.cfg allows; review the diff before committing it.
lock:
	rm -rf .venv-lock && $(PYTHON) -m venv .venv-lock
	.venv-lock/bin/python tools/lock.py quickstart tpu data beam demo gcs serve docs stablehlo dev > requirements.lock
	rm -rf .venv-lock && $(PYTHON) -m venv .venv-lock
	.venv-lock/bin/python tools/lock.py parity --over=requirements.lock > requirements-parity.lock
	rm -rf .venv-lock

clean:
	rm -rf .venv .venv-parity build dist *.egg-info
