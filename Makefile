# Two commands: `make serve` and `make test`. `make help` lists the others.
PORT ?= 8000
PYTHON3 ?= python3
PYTHON := .venv/bin/python
MANAGE := $(PYTHON) backend/server/manage.py
# Installs with uv where there is one, else with pip.
INSTALL = if command -v uv >/dev/null; then uv pip install --quiet --python $(PYTHON) $(1); \
          else $(PYTHON) -m pip install --quiet --disable-pip-version-check $(1); fi

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help serve test test-sqlite test-postgresql admin train lint clean python-is-new-enough port-is-free

help:
	@echo "make serve [PORT=8000]   train if needed, then serve on this machine"
	@echo "make test                run every test"
	@echo "make admin               create the first user of the admin pages"
	@echo "make train [ARGS=...]    train a new version, for instance ARGS='--data my.csv --target Stayed'"
	@echo "make lint                check style, types of imports and duplicated migrations"
	@echo "make clean               remove the environment, the database and the trained models"

serve: python-is-new-enough port-is-free .venv/runtime
	@echo "Preparing the database ..."
	@LOG_LEVEL=WARNING $(MANAGE) migrate --verbosity 0
	@$(PYTHON) research/train.py --if-missing
	@echo "Starting the server and loading the models (some seconds) ..."
	@cd backend/server && PORT=$(PORT) exec ../../.venv/bin/gunicorn server.wsgi

test: test-sqlite test-postgresql

# --dist loadgroup keeps tests that share a server or a browser on one worker.
PYTEST = $(PYTHON) -m pytest -n auto --dist loadgroup -q

test-sqlite: .venv/dev
	@echo "Tests on SQLite"
	@$(PYTEST)

test-postgresql: .venv/dev
	@echo "Tests on PostgreSQL"
	@$(PYTHON) backend/server/tests/postgresql.py $(PYTEST) -m "not whole"

admin: .venv/runtime
	@$(MANAGE) migrate --verbosity 0
	@$(MANAGE) create_admin

train: .venv/runtime
	@$(PYTHON) research/train.py $(ARGS)

lint: .venv/dev
	@$(PYTHON) -m ruff check .
	@$(PYTHON) -m ruff format --check .
	@$(MANAGE) makemigrations --check --dry-run
	@cd backend/server && PYTHONPATH=. ../../.venv/bin/lint-imports --config ../../pyproject.toml

clean:
	rm -rf .venv backend/server/db.sqlite3* backend/server/staticfiles research/artifacts

python-is-new-enough:
	@$(PYTHON3) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
		{ echo "Python 3.11 or newer is needed; $(PYTHON3) is $$($(PYTHON3) --version 2>&1). Name another: make serve PYTHON3=python3.12"; exit 1; }

port-is-free:
	@$(PYTHON3) -c 'import socket; s = socket.socket(); s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1); s.bind(("127.0.0.1", int("$(PORT)")))' 2>/dev/null || \
		{ echo "Port $(PORT) is in use, or is no port for you. Choose another: make serve PORT=8080"; exit 1; }

.venv/bin/python: | python-is-new-enough
	@echo "Creating the environment in .venv ..."
	@if command -v uv >/dev/null; then uv venv --quiet --python $(PYTHON3) .venv; else $(PYTHON3) -m venv .venv; fi

.venv/runtime: requirements.txt | .venv/bin/python
	@echo "Installing what the server needs (a minute or two the first time) ..."
	@began=$$(date +%s); $(call INSTALL,-r requirements.txt) && echo "  done in $$(($$(date +%s) - began)) s"
	@touch $@

.venv/dev: requirements-dev.txt research/requirements.txt .venv/runtime
	@echo "Installing what the tests need ..."
	@began=$$(date +%s); $(call INSTALL,-r requirements-dev.txt) && $(call INSTALL,--no-deps lifetimes==0.11.3) && echo "  done in $$(($$(date +%s) - began)) s"
	@touch $@
