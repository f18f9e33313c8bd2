# Two commands: `make demo` and `make test`. Each sets up all it needs and is quick the second time.

SHELL := /bin/bash
# The distribution's, on which the package runs and for which setup brings the headers.
PYTHON ?= /usr/bin/python3
# The tests start programs by the hundred: what one has compiled, the next reads.
unexport PYTHONDONTWRITEBYTECODE
VENV := .venv
BIN := $(VENV)/bin
PREFIX ?= /usr/local

# QEMU of root's libvirtd runs as another user, which cannot look into /root.
ifeq ($(shell id -u),0)
CACHE ?= /var/cache/gpud
else
CACHE ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/gpud
endif
IMAGE := $(CACHE)/guest-$(shell sha256sum tests/guest/build.sh | cut -c1-12).qcow2
export GPUD_TEST_IMAGE := $(IMAGE)
# Of the tests that wait for nobody else; a third process fills the gaps of two.
JOBS ?= $(shell n=$$(nproc); echo $$((n < 3 ? 3 : n > 8 ? 8 : n)))
CHAOS_TESTS := tests/chaos $(wildcard tests/machine/test_chaos*.py)

.PHONY: help setup demo test lint unit chaos-short chaos machine lab operator golden bench docs deb install uninstall clean
help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 15

setup: ## packages, virtual environment, libvirtd, guest image
	@tests/setup.sh
	@$(MAKE) --no-print-directory --silent $(VENV)/.ready $(IMAGE)

$(VENV)/.ready: pyproject.toml
	@echo "setup: virtual environment" >&2
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -qq --upgrade 'pip>=25.1'
	@$(BIN)/python -m pip install -qq --editable . --group dev
	@touch $@

$(IMAGE): # its name tells what it was built by, so a fresh clone does not build it again
	@mkdir -p $(CACHE)
	@tests/guest/build.sh $@

demo: setup ## an order's whole way, on this machine; KEEP=1 leaves it running
	@$(BIN)/python -m tests.machine.demo $(if $(KEEP),--keep)

test: setup ## everything: linters, types, layering, unit and machine tests
	@$(MAKE) --no-print-directory lint unit chaos-short machine

lint: $(VENV)/.ready ## linters, types, layering
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy systemd/manual.py
	$(BIN)/lint-imports
	shellcheck tests/setup.sh tests/guest/build.sh tests/lab/*.sh .ci/run cloud-init/*.sh cloud-init/golden/*.sh cloud-init/golden/*.profile \
		systemd/*.sh systemd/deb/build.sh systemd/deb/p*

unit: $(VENV)/.ready ## unit tests, with coverage
	$(BIN)/pytest tests/unit --numprocesses $(JOBS) --dist worksteal --cov --cov-report=term --cov-fail-under=95
	@$(BIN)/coverage report --include='gpud/lifecycle/*' --fail-under=100 >/dev/null || \
		{ echo "unit: an order's life is tested in every branch, and is not any more" >&2; exit 1; }

chaos-short: $(VENV)/.ready ## the short part of chaos
	$(BIN)/pytest tests/chaos --numprocesses 2 --dist worksteal

chaos: setup ## faults by the thousand into docs/chaos.md; CHAOS_CRASHES=1000, SEED=0
	CHAOS_CRASHES=$(or $(CHAOS_CRASHES),1000) $(BIN)/pytest $(CHAOS_TESTS) --timeout=900 \
		--numprocesses 2 --dist worksteal --hypothesis-seed=$(or $(SEED),0) --fault-table docs/chaos.md

machine: setup ## tests on real libvirt and QEMU
	$(BIN)/pytest tests/machine -m 'not long' -v --timeout=900 --numprocesses 2

lab: setup ## a GPU server in a box: real IOMMU, VFIO, systemd, power cuts; 25 minutes; WITHIN_S=…
	$(BIN)/pytest tests/lab/test_lab.py -v --timeout=2400 $(if $(WITHIN_S),--begin-within=$(WITHIN_S))

operator: setup ## the same box, from bare Debian to sales and back, by the package's own words; a quarter of an hour
	$(BIN)/pytest tests/lab/test_operator.py -v --timeout=2400

golden: setup ## the golden image's recipe, for real but for the driver; a quarter of an hour
	$(BIN)/pytest tests/machine/test_golden.py -v --timeout=3600

bench: setup ## what gpud costs, in ratios to peers; QUICK=1 ends within five minutes, ONLY=family,…
	@tests/setup.sh wrk virtinst
	@$(BIN)/python -m tests.bench $(if $(QUICK),--quick) $(if $(ONLY),--only $(ONLY))

docs: $(VENV)/.ready ## the reference of the configuration, from the configuration itself
	@$(BIN)/gpud config explain > docs/configuration.md

deb: ## a Debian package for this distribution, into dist/
	@systemd/deb/build.sh

install: ## without a package: below PREFIX, or for later below DESTDIR
	@systemd/install.sh $(PYTHON) $(PREFIX) $(DESTDIR)
ifeq ($(DESTDIR),)
	@$(PREFIX)/lib/gpud/prepare
	@echo "install: fill in /etc/gpud/gpud.yaml, then: gpud config check && systemctl enable --now gpud" >&2
endif

uninstall: ## takes that away; configuration, state and guests stay
	@systemd/uninstall.sh $(PREFIX) $(DESTDIR)

clean: ## forget the virtual environment and caches; the guest image stays in $(CACHE)
	rm -rf dist $(VENV) .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .coverage
