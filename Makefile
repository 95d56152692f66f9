# Needs Python 3.10 or newer, make and git; everything else is installed into .venv.
PYTHON  = python3
PROFILE = embedded
OUT     = reports
ONLY    =
SET     =
FRESH   =
SCRATCH =
N       = 50000
WORKERS = 1
FAMILIES =

BIN  = .venv/bin
DONE = .venv/.installed
# what micronet-reproduce is told, from the variables above
ARGS = --profile '$(PROFILE)' --out '$(OUT)' $(if $(strip $(ONLY)),--only '$(ONLY)') $(foreach s,$(SET),--set '$(s)') $(if $(filter-out 0 no,$(FRESH)),--fresh)

.DEFAULT_GOAL := help
.PHONY: help reproduce test mutants fuzz families check docs docs-check lab readme export record clean .venv

help:
	@echo 'make reproduce   run every notebook and make $(OUT)/$(PROFILE)/index.html; killed, the same command continues'
	@echo '                 PROFILE=embedded|laptop|paper  ONLY=scoring,released  SET="seed=1 n_images=50"  FRESH=1  OUT=folder'
	@echo 'make test        all checks: generated files in sync, every notebook at embedded, pytest; SCRATCH=folder keeps and reuses what ran'
	@echo 'make mutants     break the library on purpose, some 150 times, in memory: the tests must notice each time  ONLY="tree dynamic"'
	@echo 'make fuzz        N=50000 mutations of packed nets, and a tenth as many of stages: refused in one line, or nets like any other'
	@echo 'make families    one net of every family of timm, the whole way; killed, the same command goes on  WORKERS=2 FAMILIES="convnext deit"'
	@echo 'make docs        a site of the notebooks as committed, with an API reference: _docs/index.html'
	@echo 'make docs-check  that site in headless Chromium: no error, no foreign host, nothing wider than a phone'
	@echo 'make lab         open JupyterLab on nbs/'
	@echo 'make export      after editing a notebook: write micronet_nb/*.py and clean the notebooks'
	@echo 'make readme      after editing nbs/index.ipynb: write README.md'
	@echo 'make record      as reproduce, and keep outputs in nbs/ and records in data/results/ (then commit them)'
	@echo 'make clean       remove .venv, reports and caches (not downloads, not runs/)'
	@echo 'Each installs what it needs into .venv first; PYTHON=python3.12 chooses another Python.'

.venv: $(DONE)

# A stamp that is missing or names another folder means: interrupted, or the checkout was moved. Then install anew.
ifneq ($(shell cat $(DONE) 2>/dev/null),$(CURDIR))
$(DONE): FORCE
FORCE:
endif
$(DONE): settings.ini setup.py pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || \
	 { echo "Python 3.10 or newer is needed; '$(PYTHON)' is $$($(PYTHON) -V 2>&1). Choose another: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
	 { echo "'$(PYTHON)' lacks venv or ensurepip; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@test -f $@ || rm -rf .venv
	@rm -f $@
	@echo 'Installing into .venv (once; PyTorch is large, so this takes some minutes)'
	@test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -e '.[dev]'
	@$(BIN)/python -c "import site, pathlib; pathlib.Path(site.getsitepackages()[0], 'micronet_nb_checkout.pth').write_text('$(CURDIR)\n')"  # so that a folder called micronet_nb, seen from its parent, does not hide the package
	@$(BIN)/python -m micronet_nb.core >/dev/null  # how the environment's Jupyter starts and saves notebooks, and Git merges them
	@printf %s '$(CURDIR)' > $@

reproduce: $(DONE)
	$(BIN)/python -m micronet_nb.reproduce $(ARGS)

record: $(DONE)
	$(BIN)/python -m micronet_nb.reproduce $(ARGS) --record

lab: $(DONE)
	$(BIN)/python -m jupyterlab nbs

export: $(DONE)
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean

readme: $(DONE)
	$(BIN)/python -m micronet_nb.reproduce --readme write

check: $(DONE)
	$(BIN)/python -m micronet_nb.reproduce --check-sync --readme check

# The notebooks, which hold most tests, are run once, in a scratch folder: nothing that an earlier run has left is seen.
# Then come the tests of what no notebook shows, a file of them a process. Whichever fails, the others run, and pytest has the last word.
# Threads that spin while they wait would slow each other down where two processes share two cores,
# and large tensors that glibc gives back after every operation cost half of the time.
test: export OMP_WAIT_POLICY = PASSIVE
test: export MALLOC_MMAP_THRESHOLD_ = 4294967296
test: export MALLOC_TRIM_THRESHOLD_ = 8589934592
test: check
	@if [ -n '$(SCRATCH)' ]; then mkdir -p '$(SCRATCH)' && scratch=$$(cd '$(SCRATCH)' && pwd); else scratch=$$(mktemp -d) && trap 'rm -rf "$$scratch"' EXIT; fi && \
	 export MICRONET_RUNS="$$scratch/runs" MICRONET_TEST_REPORTS="$$scratch/reports"; \
	 echo 'every notebook at embedded (python -m micronet_nb.reproduce):'; \
	 $(BIN)/python -m micronet_nb.reproduce --out "$$scratch/reports"; ran=$$?; \
	 echo 'the tests (pytest):'; \
	 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile --durations 15 -rs --no-fold-skipped tests; tested=$$?; \
	 exit $$((ran | tested))

# Only the site needs MkDocs.
$(BIN)/mkdocs: $(DONE)
	$(BIN)/python -m pip install --disable-pip-version-check -e '.[docs]'
	@touch $@

docs: export NO_MKDOCS_2_WARNING = 1
docs: $(BIN)/mkdocs
	$(BIN)/mkdocs build --quiet --strict --config-file docs/mkdocs.yml
	@echo '_docs/index.html'

docs-check: docs
	$(BIN)/python tests/browser.py _docs

# Not a part of `test`: it asks whether the tests would notice.
mutants: $(DONE)
	$(BIN)/python tests/mutants.py $(ONLY)

# The tests try a few hundred of these.
fuzz: $(DONE)
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore tests/fuzz.py $(N)

# An hour or two of a core; resumable.
families: $(DONE)
	OMP_NUM_THREADS=1 $(BIN)/python -m micronet_nb.families --workers '$(WORKERS)' $(FAMILIES)

clean:
	rm -rf .venv reports build _docs *.egg-info .pytest_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +
