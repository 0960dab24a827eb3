# What people and CI type. Each target is a thin call of the command line; see README.md.
#
#   make image [PROFILE=default] [YES=1]   install what the host lacks (asks; YES=1 does not), build the profile
#   make test  [PROFILE=default] [YES=1]   = make check + make acceptance
#   make publish PROVIDERS="aws gcp" [PROFILE=default]   take the accepted image there (publish.yaml tells where)
.POSIX:
PROFILE = default
VENV = .venv
RECVIRT = $(VENV)/bin/recvirt
PYTHON = $(VENV)/bin/python
BUILD_FLAGS =
TEST_FLAGS =
SOAK_FLAGS = --minutes 30
PROVIDERS =
PUBLISH_FLAGS =

.PHONY: help host dev image check lint types unit acceptance test bench clean stage-tests \
	cloud-debian cloud-soak cloud-boundaries publish publish-servers publish-local publish-tests \
	acceptance-deep acceptance-kernels acceptance-vmx acceptance-matrix acceptance-workers acceptance-mutations \
	image-minimal image-debian-kernel image-kernel-7 image-bookworm image-debug image-bench \
	acceptance-minimal acceptance-debian-kernel acceptance-kernel-7 acceptance-bookworm

help:
	@sed -n 's/^#   //p' Makefile
	@echo "longer ones: stage-tests publish-local publish-tests cloud-debian cloud-soak cloud-boundaries bench acceptance-deep acceptance-kernels acceptance-vmx acceptance-matrix acceptance-workers acceptance-mutations"
	@echo "             image-PROFILE and acceptance-PROFILE for minimal debian-kernel kernel-7 bookworm"

host:
	@VENV="$(VENV)" YES="$(YES)" sh scripts/bootstrap.sh

dev:
	@VENV="$(VENV)" YES="$(YES)" DEV=1 sh scripts/bootstrap.sh

image: host
	$(RECVIRT) doctor
	$(RECVIRT) build $(BUILD_FLAGS) $(PROFILE)

check: lint types unit

lint: dev
	$(PYTHON) -m ruff check recvirt tests benchmarks setup.py

types: dev
	$(PYTHON) -m mypy

unit: dev
	$(PYTHON) -m pytest -q -n auto -m "not slow" tests/unit tests/cloud tests/publish

acceptance: host
	$(RECVIRT) test $(TEST_FLAGS) $(PROFILE)

test: check acceptance

stage-tests: dev
	$(PYTHON) -m pytest -v tests/stages tests/unit tests/cloud -m slow
	$(PYTHON) -m pytest -v tests/stages -m "not slow"

publish: host
	$(RECVIRT) publish $(PUBLISH_FLAGS) $(PROVIDERS) $(PROFILE)

publish-servers:
	@YES="$(YES)" sh scripts/publish-servers.sh

publish-local: dev publish-servers
	$(PYTHON) -m tests.publish.local --image $(PROFILE) $(PROVIDERS)

publish-tests: dev publish-servers
	$(PYTHON) -m pytest -v -n 2 tests/publish

cloud-debian: dev
	$(PYTHON) -m pytest -v tests/stages/test_cloud_debian.py

cloud-soak: dev
	$(PYTHON) -m tests.cloud.soak $(SOAK_FLAGS)

cloud-boundaries: dev
	$(PYTHON) -m tests.cloud.faults.boundaries

acceptance-deep: host
	$(RECVIRT) test --deep $(TEST_FLAGS) $(PROFILE)

acceptance-kernels: host
	$(RECVIRT) test --kernels $(TEST_FLAGS) $(PROFILE)

acceptance-vmx: host
	$(RECVIRT) test --vmx $(TEST_FLAGS) $(PROFILE)

acceptance-workers: host
	$(RECVIRT) build $(BUILD_FLAGS) nested-cloud
	$(RECVIRT) build $(BUILD_FLAGS) nested-cloud-worker
	$(RECVIRT) test --workers $(TEST_FLAGS) nested-cloud

acceptance-matrix: host
	$(RECVIRT) test --matrix $(TEST_FLAGS) $(PROFILE)

acceptance-mutations: dev
	$(PYTHON) -m pytest -v tests/acceptance

image-minimal image-debian-kernel image-kernel-7 image-bookworm image-debug image-bench: host
	$(RECVIRT) build $(BUILD_FLAGS) $(@:image-%=%)

acceptance-minimal acceptance-debian-kernel acceptance-kernel-7 acceptance-bookworm: host
	$(RECVIRT) build $(BUILD_FLAGS) $(@:acceptance-%=%)
	$(RECVIRT) test $(TEST_FLAGS) $(@:acceptance-%=%)

bench: dev
	$(PYTHON) benchmarks/run.py

clean:
	[ ! -x $(RECVIRT) ] || $(RECVIRT) clean
	rm -rf build/* .cache $(VENV)
