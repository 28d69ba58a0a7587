# make demo   run the bundle on real images that come with the installed packages; look at out/demo/index.html
# make serve  serve it to OHIF and 3D Slicer; STUDIES=folder or DICOMweb URL (sample images without), PORT=8000, OPTIONS="--verbose"
# make ohif   OHIF with sample studies to click on: installs Orthanc where it may, and prints one address; PORT=8000
# make test   run the whole test suite, a file per core at a time; make quick: what takes about two minutes
# make lint   what CI asks for: ruff, and mypy over the package
# All set up .venv first when it is not there. PYTHON=python3.12 picks another interpreter.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: install demo serve ohif test quick lint format zoo clean

install: $(STAMP)

# torch goes first and alone: asked for by another package it can pull gigabytes of CUDA libraries.
$(STAMP): pyproject.toml hatch_build.py requirements.txt requirements-no-deps.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet --constraint requirements.txt --editable ".[all]"
	$(BIN)/pip install --quiet --no-deps -r requirements-no-deps.txt
	touch $@

demo: install
	$(BIN)/python scripts/demo.py --output_dir out/demo

serve: install
	$(BIN)/zeroseg serve $(if $(STUDIES),--studies "$(STUDIES)") $(if $(PORT),--port $(PORT)) $(OPTIONS)

ohif: install
	sh scripts/install_e2e.sh orthanc
	$(BIN)/python scripts/viewer/ohif.py $(if $(PORT),--port $(PORT)) $(OPTIONS)

# Orthanc and Chromium, where they may be installed; the tests that drive them are skipped where not.
test: install
	sh scripts/install_e2e.sh
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

quick: install
	$(BIN)/python -m pytest -m "not slow"

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The bundle under the Model Zoo's naming rule: what a pull request there copies into models/.
ZOO := dist/zeroseg_diffusion_zeroshot
zoo:
	rm -rf $(ZOO)
	mkdir -p dist
	cp -R bundle $(ZOO)
	find $(ZOO) -name __pycache__ -prune -exec rm -r {} +

clean:
	rm -rf $(VENV) out dist
