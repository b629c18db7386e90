# Two commands do everything on a fresh machine (Python 3.11, git, make):
#   make demo   installs, then runs the main job end to end and prints what happened
#   make test   installs, then lints, type-checks and runs the tests
.PHONY: demo test install lint types check lock clean

BIN := .venv/bin
# No telemetry, no model hub: nothing here calls out by itself.
export DEEPEVAL_TELEMETRY_OPT_OUT := YES
export DEEPEVAL_DISABLE_DOTENV := 1
export RAY_USAGE_STATS_ENABLED := 0
export VLLM_NO_USAGE_STATS := 1
export HF_HUB_OFFLINE := 1
export HF_HUB_DISABLE_TELEMETRY := 1
export DVC_NO_ANALYTICS := 1

demo: install
	$(BIN)/goldgate demo

test: install lint types
	$(BIN)/python -m pytest tests

install:
	@scripts/install

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/mypy

lock:
	scripts/lock

clean:
	rm -rf build .goldgate .mypy_cache .ruff_cache
