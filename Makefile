# Everything runs in .venv with the versions of constraints.txt. Needs Python 3.11 or newer.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
ORACLES := .venv/oracles/.installed

.PHONY: book publish real test lab clean

book: $(INSTALLED)
	$(BIN)/python -m fihelpers build --profile embedded

publish: $(INSTALLED)
	$(BIN)/python -m fihelpers build --profile embedded --check

real: $(INSTALLED)
	$(BIN)/python -m fihelpers fetch smollm2
	$(BIN)/python -m fihelpers real

test: $(INSTALLED) $(ORACLES)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'not alone' -n 2 --dist worksteal
	$(BIN)/python -m pytest -m alone
	$(BIN)/python -m fihelpers build --profile smoke --check

lab: $(INSTALLED)
	$(BIN)/python -m ipykernel install --sys-prefix --name fihelpers --display-name fihelpers
	JUPYTER_PREFER_ENV_PATH=1 $(BIN)/python -m jupyterlab notebooks --MultiKernelManager.default_kernel_name=fihelpers

clean:
	rm -rf .venv build book/_build book/chapters book/assets

# .venv/rooms shows the packages to mypy, which does not follow what pip leaves of an editable installation
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("fihelpers needs Python 3.11 or newer")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[all,test]"
	rm -rf .venv/rooms && mkdir .venv/rooms
	ln -s ../../fihelpers .venv/rooms/fihelpers
	ln -s ../../notebooks/chapters .venv/rooms/fichapters
	ln -s ../../book/bookmaker .venv/rooms/fibook
	ln -s ../../data/minis .venv/rooms/fiminis
	touch $@

# torchao checks our quantization, and Triton runs the kernel of GPUs where there is none; outside the import
# path, because transformers and torch load them wherever they find them
$(ORACLES): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target .venv/oracles -c constraints.txt torchao triton
	touch $@
