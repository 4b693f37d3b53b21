# slml_nb: `make demo` shows it, `make test` checks it. Both build .venv on the first call (some minutes), once.
SHELL  := /bin/bash
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
pip = $(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test slow test-aws check bench sample readme lab clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.installed ## from raw flights to a gated, packaged, served model and its report
	@$(BIN)/slml run params/flights.yaml || { s=$$?; test $$s -eq 3 && echo "(the run itself went well: the verdict is that no model is good enough)"; }

test: $(VENV)/.tested check ## the export is fresh, the notebooks are clean, every notebook and every quick test passes
	$(BIN)/nbdev_test --n_workers 2 --do_print
	$(BIN)/python -m pytest tests -q -m "not slow"

slow: $(VENV)/.tested ## the long suites: faults of the store, Papermill's own tests, strangers' notebooks, MLflow, many random kills
	$(BIN)/python -m pytest tests -q -m slow

test-aws: $(VENV)/.tested ## what only an account can show: `make test-aws YES=--yes` costs less than a dollar; without it, nothing is done
	$(BIN)/python tests/aws_account.py $(YES)

check: $(VENV)/.installed ## slml_nb/ is what nbs/ exports, and the notebooks are clean
	@set -e; copy=$$(mktemp -d); trap 'rm -rf "$$copy"' EXIT; \
	cp -r settings.ini nbs slml_nb "$$copy"; \
	(cd "$$copy" && rm -f slml_nb/_modidx.py && find slml_nb -maxdepth 1 -name '[a-z]*.py' -delete \
	  && "$(abspath $(BIN))"/nbdev_export && "$(abspath $(BIN))"/nbdev_clean); \
	diff -rq -x __pycache__ -x sample slml_nb "$$copy/slml_nb" \
	  || { echo "slml_nb/ is not what nbs/ exports: run $(BIN)/nbdev_export (or nbdev_update, if you edited the .py)"; exit 1; }; \
	diff -rq -x .ipynb_checkpoints nbs "$$copy/nbs" || { echo "a notebook is not clean: run $(BIN)/nbdev_clean"; exit 1; }; \
	echo "export fresh, notebooks clean"

bench: $(VENV)/.tested ## measures, and writes bench/results.md
	$(BIN)/python bench/run.py

sample: $(VENV)/.installed ## makes slml_nb/sample, the small built-in run, anew from params/sample.yaml
	$(BIN)/slml run params/sample.yaml || test $$? -eq 3
	$(BIN)/python -c "from slml_nb.run import export_run, find_run; export_run(find_run('sample'), 'slml_nb/sample', pictures=False)"

define README
import pathlib, re, nbformat
from nbconvert import MarkdownExporter
nb = nbformat.read("nbs/index.ipynb", 4)
nb.metadata["language_info"] = {"name": "python"}
nb.cells = [c for c in nb.cells if not re.search(r"^#\|\s*(hide|default_exp)", c.source, re.M)]
for c in nb.cells:
    if re.search(r"^#\|\s*echo:\s*false", c.source, re.M): c.metadata["transient"] = {"remove_source": True}
    if c.cell_type == "code": c.source = re.sub(r"^#\|.*\n?", "", c.source, flags=re.M)
text, made = MarkdownExporter().from_notebook_node(nb, {"output_files_dir": "nbs/images", "unique_key": "index"})
text = re.sub(r"\n{3,}", "\n\n", re.sub(r"[ \t]+$$", "", text, flags=re.M)).strip()
pathlib.Path("nbs/images").mkdir(exist_ok=True)
for name, data in made["outputs"].items(): pathlib.Path(name).write_bytes(data)
pathlib.Path("README.md").write_text(f"<!-- made from nbs/index.ipynb by `make readme` -->\n\n{text}\n", encoding="utf-8")
endef
export README

readme: $(VENV)/.installed ## README.md from nbs/index.ipynb, with the outputs it was saved with
	@$(BIN)/python -c "$$README"

lab: $(VENV)/.installed ## the notebooks in JupyterLab
	$(BIN)/jupyter lab nbs

clean: ## takes away .venv and what builds leave; your runs stay
	rm -rf $(VENV) build dist _proc *.egg-info .pytest_cache

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "slml_nb needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1 | head -n1). Say which to use: make $(or $(MAKECMDGOALS),demo) PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { echo "could not make $(VENV): on Debian and Ubuntu, apt install python3-venv"; exit 1; }
	@echo "building $(VENV): some minutes, once"
	@$(pip) pip setuptools wheel
	@touch $@

$(VENV)/.installed: $(VENV)/.python settings.ini setup.py constraints.txt
	@$(pip) --no-build-isolation -e .
	@touch $@

$(VENV)/.tested: $(VENV)/.installed
	@$(pip) --no-build-isolation -e '.[dev]'
	@$(pip) --no-deps --upgrade --target $(VENV)/rie aws-sam-cli==1.170.0
	@touch $@
