# Two commands: `make serve` and `make test`. `make help` lists the others.
PORT ?= 8000
PYTHON3 ?= python3
PYTHON := .venv/bin/python
MANAGE := $(PYTHON) backend/server/manage.py

.DEFAULT_GOAL := help
.NOTPARALLEL:
.SUFFIXES:
.PHONY: help serve test test-sqlite test-postgresql test-slow admin train lint bench bench-batch soak clean \
        python-is-new-enough port-is-free environment

help:
	@echo "make serve [PORT=8000]   train if needed, then serve on this machine"
	@echo "make test                run every test"
	@echo "make test-slow           run simulations and other long tests, and show what they measured"
	@echo "make admin               create the first user of the admin pages"
	@echo "make train [ARGS=...]    train a new version, for instance ARGS='--data my.csv --target Stayed'"
	@echo "make lint                check style, imports between modules, and missing migrations"
	@echo "make bench [QUICK=1]     measure this product beside what could be used instead (see bench/README.md)"
	@echo "make bench-batch         measure the scoring of a large file beside a script that does the same"
	@echo "make soak [MINUTES=10]   serve at full load, and watch memory, errors and p99"
	@echo "make clean               remove the environment, the database, the files of batch jobs and the trained models"

# PORT is exported for the server, which replaces the shell, so that Ctrl-C reaches nothing else.
serve: port-is-free environment .venv/runtime
	@echo "Preparing the database ..."
	@LOG_LEVEL=WARNING $(MANAGE) migrate --verbosity 0
	@echo "Looking for trained models (without any, they are trained now: about ten seconds) ..."
	@$(PYTHON) research/train.py --if-missing
	@echo "Starting the server and loading the models (some seconds) ..."
	@PORT=$(PORT) exec $(PYTHON) backend/server/serve.py

test: test-sqlite test-postgresql

# --dist loadgroup keeps tests that share a server or a browser on one worker.
PYTEST = $(PYTHON) -m pytest -n auto --dist loadgroup -q

test-sqlite: environment .venv/dev
	@echo "Tests on SQLite"
	@$(PYTEST)

test-postgresql: environment .venv/dev
	@echo "Tests on PostgreSQL"
	@$(PYTHON) backend/server/tests/postgresql.py $(PYTEST) -m "not whole and not slow"

# TESTS=path/of/a/test_file.py chooses.
test-slow: environment .venv/dev
	@$(PYTHON) -m pytest -q -m slow -rP $(TESTS)

admin: environment .venv/runtime
	@LOG_LEVEL=WARNING $(MANAGE) migrate --verbosity 0
	@$(MANAGE) create_admin

train: environment .venv/runtime
	@$(PYTHON) research/train.py $(ARGS)

lint: environment .venv/dev
	@$(PYTHON) -m ruff check .
	@$(PYTHON) -m ruff format --check .
	@$(MANAGE) makemigrations --check --dry-run
	@cd backend/server && PYTHONPATH=. ../../.venv/bin/lint-imports --config ../../pyproject.toml

# ONLY=sqlite,mlflow chooses contestants, WRITE=1 puts the results into bench/README.md, ARGS adds other options.
bench: environment .venv/runtime
	@exec $(PYTHON) bench/run.py $(if $(QUICK),--quick) $(if $(ONLY),--only $(ONLY)) $(if $(WRITE),--write) $(ARGS)

bench-batch: environment .venv/runtime
	@exec $(PYTHON) bench/batch.py $(ARGS)

soak: environment .venv/runtime
	@exec $(PYTHON) bench/soak.py $(if $(MINUTES),--minutes $(MINUTES)) $(ARGS)

clean:
	rm -rf .venv backend/server/db.sqlite3* backend/server/staticfiles backend/server/batches research/artifacts bench/environments

# --- What must hold before anything slow begins -----------------------------------------------------------
define TRY_ENVIRONMENT
import os, sys, sysconfig
sys.exit(sys.version_info < (3, 11) or not os.path.isdir(sysconfig.get_path("purelib")))
endef
define TRY_PORT
import socket, sys
try:
    port = int(sys.argv[1])
    if port < 1:
        raise ValueError
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port))
except (ValueError, OverflowError):
    sys.exit(f"PORT={sys.argv[1]} is no port: give a number from 1 to 65535, as in: make serve PORT=8080")
except PermissionError:
    sys.exit(f"Port {sys.argv[1]} is reserved for the administrator. Choose another: make serve PORT=8080")
except OSError:
    sys.exit(f"Port {sys.argv[1]} is in use by another program. Choose another: make serve PORT=8080")
endef
export TRY_ENVIRONMENT TRY_PORT

# .venv/unfinished is there while something is being installed. An environment that is whole needs no other Python.
IS_WHOLE = { test ! -e .venv/unfinished && $(PYTHON) -c "$$TRY_ENVIRONMENT" 2>/dev/null; }
ANY_PYTHON = "$$($(IS_WHOLE) && echo $(PYTHON) || echo '$(PYTHON3)')"

python-is-new-enough:
	@$(ANY_PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		found=$$($(PYTHON3) --version 2>/dev/null) || found="not installed"; \
		echo "Python 3.11 or newer is needed, and $(PYTHON3) is $$found. Name another: make $(firstword $(MAKECMDGOALS)) PYTHON3=python3.12" >&2; \
		exit 1; }

port-is-free: python-is-new-enough
	@$(ANY_PYTHON) -c "$$TRY_PORT" '$(PORT)'

# --- The environment --------------------------------------------------------------------------------------
# Goes before .venv/runtime and .venv/dev, which are dated by when they were installed, since it may remove them.
environment: python-is-new-enough
	@$(IS_WHOLE) || { \
		test ! -e .venv || echo "The environment in .venv was left unfinished, or its Python is gone or too old."; \
		echo "Creating the environment in .venv ..."; \
		rm -rf .venv; \
		if command -v uv >/dev/null; then uv venv --quiet --python '$(PYTHON3)' .venv; \
			else mkdir .venv && touch .venv/unfinished && $(PYTHON3) -m venv .venv; fi || { rm -rf .venv; exit 1; }; }

# An interruption ends the shell too, and so leaves .venv/unfinished behind; a plain failure does not.
define INSTALL
@began=$$(date +%s); touch .venv/unfinished; \
if command -v uv >/dev/null; then \
	install() { uv pip install --quiet --python $(PYTHON) "$$@"; }; \
else \
	$(PYTHON) -c 'import pip' 2>/dev/null || $(PYTHON) -m ensurepip >/dev/null 2>&1; \
	install() { $(PYTHON) -m pip install -qq --disable-pip-version-check "$$@"; }; \
fi; \
$(1); failed=$$?; rm -f .venv/unfinished; \
test $$failed = 0 || { echo "The installation failed; the lines above say why. The same command tries again." >&2; exit 1; }; \
echo "  done in $$(($$(date +%s) - began)) s"; touch $@
endef

.venv/runtime: requirements.txt
	@echo "Installing what the server needs (a minute or two the first time) ..."
	$(call INSTALL,install -r requirements.txt)

.venv/dev: requirements-dev.txt requirements-dask.txt research/requirements.txt .venv/runtime
	@echo "Installing what the tests need (a minute or two the first time) ..."
	$(call INSTALL,install -r requirements-dev.txt && install --no-deps lifetimes==0.11.3)
